"""The mathematics as Triton device functions: the names and the order of csrc/math.h.

Elementwise in float32 or float64, no load or store; anything of a shape that broadcasts. FAST is a
compile-time flag: the target is CUDA, whose approximate instructions are used where a float32
result stays within the stated error. The interpreter and AMD take the portable expression. HALF is
another: x was a half float.

Errors are relative and count every approximation at the maximum its PTX instruction documents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import (
    BALANCED,
    FOCAL,
    FOCAL_PROBABILITIES,
    IOU_AWARE,
    LOGITS,
    MATCHABILITY,
    PROBABILITIES,
    VARIFOCAL,
    VARIFOCAL_PROBABILITIES,
)

# A kernel reads no other globals.
LOGITS_FORM, PROBABILITIES_FORM = tl.constexpr(LOGITS), tl.constexpr(PROBABILITIES)
VARIFOCAL_FORM = tl.constexpr(VARIFOCAL)
VARIFOCAL_PROBABILITIES_FORM = tl.constexpr(VARIFOCAL_PROBABILITIES)
FOCAL_FORM, FOCAL_PROBABILITIES_FORM = tl.constexpr(FOCAL), tl.constexpr(FOCAL_PROBABILITIES)
MATCHABILITY_FORM, IOU_AWARE_FORM = tl.constexpr(MATCHABILITY), tl.constexpr(IOU_AWARE)
BALANCED_FORM = tl.constexpr(BALANCED)

# Exponential and logarithm


@triton.jit
def exponential(x, CAREFUL: tl.constexpr = False):
    """exp(x). Valid: x <= 88, -inf and NaN included. Error (float32): 2^-22 + 6e-8 |x|, because
    x log2(e) is rounded before 2^x: at most 5e-6, where exp(x) itself is 1e-38. CAREFUL: 2^-22 for
    finite x, the rounded part being multiplied in.

    0 below the smallest normal number.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    elif CAREFUL:
        t = x * 1.4426950408889634
        rest = tl.fma(x, 1.4426950216293335, -t) + x * 1.925963033500e-8  # log2(e) in two parts
        e = tl.exp2(t)
        return tl.where(e > 0.0, e + e * (rest * 0.6931471805599453), e)  # rest is NaN for -inf
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x. Valid: normal x below 2^126, NaN. Error (float32, FAST): 1 ulp."""
    if FAST and x.dtype == tl.float32:
        # 1 / x compiles to div.full.f32, which spends three more instructions on x beyond 2^126.
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def log1p_unit(e, HALF: tl.constexpr = False):
    """log(1 + e). Valid: e in [0, 1], NaN. Error: 3.4e-7 (float32; a term less than csrc/math.h,
    because here every instruction shows), 3e-16 (float64), 1.5e-6 (HALF: such logits were rounded
    to 2^-12 at best).

    Not log(1 + e): in float32 that is 0 for every e below 6e-8, a logit of -17. Nor lg2.approx,
    which is good to 2^-22 absolute only.
    """
    if e.dtype == tl.float64:
        u = 1.0 + e
        return tl.log(u) + (e - (u - 1.0)) / u  # the correction restores what 1 + e rounds away
    elif HALF:
        p = e * 0.014141022227704525 - 0.06640179455280304
        p = p * e + 0.14922386407852173
        p = p * e - 0.2350386083126068
        p = p * e + 0.33109450340270996
        p = p * e - 0.4998696446418762
        p = p * e + 0.9999987483024597
        return p * e
    else:
        p = e * -0.008539197801925138 + 0.04408959149373808
        p = p * e - 0.10768165299070905
        p = p * e + 0.17745236940510242
        p = p * e - 0.2449546105570622
        p = p * e + 0.3327547943749218
        p = p * e - 0.4999740537328888
        p = p * e + 0.9999998056682943
        return p * e


@triton.jit
def below_normal(x):
    """Whether a number is below the smallest normal one, which has a logarithm."""
    if x.dtype == tl.float64:
        return x < 2.2250738585072014e-308
    else:
        return x < 1.1754943508222875e-38


@triton.jit
def logarithm(v, FAST: tl.constexpr = False, NORMAL: tl.constexpr = False):
    """log(v). Valid: v > 0, NaN; 0 gives -inf. Error: 1.2e-7 (float32), 2.3e-16 (float64); 3.5e-7
    for v <= 1/2, 1.3e-6 for v <= 7/8 (float32, FAST: lg2.approx is good to 2^-22 absolute, near 1
    that is not enough). NORMAL: no v is a denormal, which costs four instructions.
    """
    if FAST and v.dtype == tl.float32:
        instruction: tl.constexpr = "lg2.approx.ftz.f32" if NORMAL else "lg2.approx.f32"
        log2_v = tl.inline_asm_elementwise(
            instruction + " $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
        return log2_v * 0.6931471805599453
    else:
        return tl.log(v)


@triton.jit
def log1m(p, FAST: tl.constexpr, HALF: tl.constexpr = False):
    """log(1 - p). Valid: p in [0, 1/2], NaN; p in [0, 1/8] if FAST and HALF. Error: 1.5e-7, or
    2.9e-7 if FAST, 6.1e-7 if FAST and HALF (float32), 3.6e-16 (float64).
    """
    if FAST and HALF and p.dtype == tl.float32:
        y = p * 0.3083760738372803 + 0.3285427391529083
        y = y * p + 0.5001226663589478
        y = y * p + 0.9999995231628418
        return -(y * p)
    elif FAST and p.dtype == tl.float32:
        y = p * 1.184933066368103 - 1.081543207168579
        y = y * p + 0.7854332327842712
        y = y * p + 0.03801724687218666
        y = y * p + 0.2722506821155548
        y = y * p + 0.33186259865760803
        y = y * p + 0.5000365376472473
        y = y * p + 0.9999998807907104
        return -(y * p)
    else:
        u = 1.0 - p
        return tl.log(u) - (p - (1.0 - u)) / u  # the correction restores what 1 - p rounds away


@triton.jit
def exponential_near_one(x):
    """exp(x). Valid: x <= 88, -inf and NaN included. Error (float32): 0.7 ulp for |x| < 1/8, beyond
    it that of exponential.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        p = x * 0.008333333333333333 + 0.041666666666666664
        p = p * x + 0.16666666666666666
        p = p * x + 0.5
        p = p * x + 1.0
        return tl.where(tl.abs(x) < 0.125, p * x + 1.0, exponential(x))


@triton.jit
def pow_abs(log_abs_d, beta):
    """|d|^beta for |d| in (0, 1.1], given log |d|; the caller takes care of d = 0."""
    return exponential(log_abs_d * beta)


@triton.jit
def quotient(a, b):
    """a / b, rounded correctly. In float32 `/` is div.full, good to 2 ulp."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def arctangent(x):
    """atan(x). Valid: all. Error: 2e-7 (float32), 2.5e-16 (float64)."""
    a = tl.abs(x)
    # |z| <= tan(pi / 8): atan(a) = pi / 2 + atan(-1 / a) = pi / 4 + atan((a - 1) / (a + 1)).
    steep = a > 2.414213562373095
    middle = a > 0.41421356237309503
    z = quotient(
        tl.where(steep, -1.0, tl.where(middle, a - 1.0, a)),
        tl.where(steep, a, tl.where(middle, a + 1.0, 1.0)),
    )
    zeros = tl.zeros_like(x)  # two numbers would be float32
    base = tl.where(steep, 1.5707963267948966, tl.where(middle, 0.7853981633974483, zeros))
    y = z * z
    if x.dtype == tl.float64:
        p = y * -0.013916943217800841 + 0.03063443323901452
        p = p * y - 0.04104381417807643
        p = p * y + 0.04719381457895137
        p = p * y - 0.052580394289794816
        p = p * y + 0.05881925033877732
        p = p * y - 0.06666642004996545
        p = p * y + 0.07692306735321475
        p = p * y - 0.0909090906699066
        p = p * y + 0.11111111110754406
        p = p * y - 0.14285714285711515
        p = p * y + 0.19999999999999993
        p = p * y - 0.3333333333333333
    else:
        p = y * -0.06451718509197235 + 0.10743668675422668
        p = p * y - 0.14263950288295746
        p = p * y + 0.19999539852142334
        p = p * y - 0.3333333134651184
    angle = base + (z + (z * y) * p)
    return tl.where(x < 0.0, -angle, angle)


# Quality family. A loss and its derivative in x, per element.


@triton.jit
def logistic(x, FAST: tl.constexpr, HALF: tl.constexpr, CAREFUL: tl.constexpr = False):
    """(log1p_e, w, ds, a, e, r), what every formula on logits starts from.

    With a = |x|, e = exp(-a): r = 1 / (1 + e), w = e / (1 + e) = sigmoid(-a), ds = s (1 - s) =
    w / (1 + e). tau = 1 - q for x >= 0, else q; then |x| tau + log1p(e) = B and tau - w =
    sign(x) d. Nothing cancels, nothing overflows.
    """
    a = tl.abs(x)
    e = exponential(-a, CAREFUL)
    r = reciprocal(e + 1.0, FAST)
    w = e * r
    return log1p_unit(e, HALF), w, w * r, a, e, r


@triton.jit
def cross_entropy(a, tau, log1p_e):
    """B = |x| tau + log1p(e), without the first term for tau = 0: an infinite logit on the right
    side."""
    return tl.where(tau == 0.0, 0.0, a) * tau + log1p_e


@triton.jit
def quality_background_loss_grad(x, FAST: tl.constexpr, HALF: tl.constexpr):
    """Quality Focal Loss with beta = 2 on a background element, q = 0: L = s^2 softplus(x),
    dL/dx = s^2 (s + 2 (1 - s) softplus(x)).
    """
    log1p_e, w, _, _, _, r = logistic(x, FAST, HALF)
    positive = x >= 0.0
    s = tl.where(positive, r, w)
    b = log1p_e + tl.where(positive, x, 0.0)
    square = s * s
    rest = tl.where(positive, w, r)  # 1 - s
    return square * b, square * ((rest * b) * 2.0 + s)


@triton.jit
def quality_square_loss_grad(x, q, FAST: tl.constexpr, HALF: tl.constexpr):
    """Quality Focal Loss with beta = 2: L = d^2 B, dL/dx = d^2 d + 2 d s (1 - s) B."""
    log1p_e, w, ds, a, _, _ = logistic(x, FAST, HALF)
    positive = x >= 0.0
    tau = tl.where(positive, 1.0 - q, q)
    b = cross_entropy(a, tau, log1p_e)
    d = tau - w  # sign(x) d
    square = d * d
    g = d * ((b * ds) * 2.0 + square)
    return square * b, tl.where(positive, g, -g)


@triton.jit
def quality_loss_grad(x, q, beta, FAST: tl.constexpr):
    """Quality Focal Loss: L = |d|^beta B, dL/dx = |d|^beta d + beta |d|^(beta - 1) sign(d)
    s (1 - s) B, both terms of w = |d|^beta being 0^beta and 0 at d = 0.

    For q = 0 the second is beta s^beta (1 - s) B, finite for every beta >= 0: s (1 - s) / |d| is
    taken as 1 - s there, which matters where s underflows.
    """
    # To the last digit, w again with the exact remainder of its division: for beta < 1 the slope at
    # small d multiplies the error.
    log1p_e, w, ds, a, e, r = logistic(x, FAST, HALF=False, CAREFUL=True)
    total = e + 1.0
    w = w + (tl.fma(-w, total, e) - w * (e - (total - 1.0))) * r
    positive = x >= 0.0
    tau = tl.where(positive, 1.0 - q, q)
    b = cross_entropy(a, tau, log1p_e)
    d = tau - w
    size = tl.abs(d)
    zero = size <= 0.0
    safe = tl.where(zero, 1.0, size)
    power = tl.where(zero, tl.where(beta == 0.0, 1.0, 0.0), pow_abs(logarithm(safe), beta))
    slope = ds / safe  # s (1 - s) / |d|
    slope = tl.where(q == 0.0, tl.where(positive, w, 1.0 - w), slope)  # 1 - s
    sign = tl.where(zero, 0.0, tl.where(d > 0.0, 1.0, -1.0))
    g = power * (d + beta * (sign * (slope * b)))
    return power * b, tl.where(positive, g, -g)


@triton.jit
def power_slope(d, beta, SQUARE: tl.constexpr):
    """(|d|^beta, its derivative beta |d|^(beta - 1) sign(d), which is 0 at d = 0). SQUARE: beta is
    2.
    """
    if SQUARE:
        return d * d, d + d
    else:
        size = tl.abs(d)
        zero = below_normal(size)
        safe = tl.where(zero, 1.0, size)
        power = tl.where(zero, tl.where(beta == 0.0, 1.0, 0.0), pow_abs(logarithm(safe), beta))
        slope = beta * (power / safe)
        return power, tl.where(zero, 0.0, tl.where(d > 0.0, slope, -slope))


@triton.jit
def bce_loss_grad(p, q, BACKGROUND: tl.constexpr, FAST: tl.constexpr, HALF: tl.constexpr):
    """Binary cross entropy of probabilities: B = -q log p - (1 - q) log(1 - p) with logs clamped at
    -100; dB/dp = (p - q) / max(p (1 - p), 1e-12): F.binary_cross_entropy's rules.

    BACKGROUND: q is 0, and a NaN is left to a factor |p|^beta.
    """
    u = 1.0 - p
    if BACKGROUND:
        # B = -log(1 - p), of u < 0 the logarithm is NaN, and maximum takes the other number.
        inside = tl.maximum(p, 0.0)
        large: tl.constexpr = 0.125 if FAST and HALF else 0.5
        far = tl.maximum(logarithm(u, FAST, NORMAL=True), -100.0)
        b = -tl.where(p >= large, far, log1m(inside, FAST, HALF))
        reach, beyond = inside, u < 0.0
    else:
        # m is the smaller of p and 1 - p. Its logarithm is far from 0, the other's is log(1 - m).
        upper = p >= 0.5
        m = tl.where(upper, u, p)
        beyond = m < 0.0
        m = tl.where(beyond, 0.0, m)
        near = log1m(m, FAST)
        if FAST:
            far = logarithm(m, FAST)
        elif p.dtype == tl.float64:
            far = logarithm(m)
        else:  # a denormal, sigmoid(-95) in float32, has a logarithm too
            tiny = below_normal(m)
            far = logarithm(tl.where(tiny, m * 18446744073709551616.0, m))
            far -= tl.where(tiny, 44.3614195558364998, 0.0)  # log(2^64)
        far = tl.where(far < -100.0, -100.0, far)
        b = (q - 1.0) * tl.where(upper, far, near) - q * tl.where(upper, near, far)
        reach = p - q
    # The float that PyTorch has in every dtype.
    spread = tl.maximum(p * u, 9.999999960041972e-13)
    # A p beyond [0, 1] stands still.
    return b, tl.where(beyond, 0.0, reach * reciprocal(spread, FAST))


@triton.jit
def quality_probability_loss_grad(
    p,
    q,
    beta,
    SQUARE: tl.constexpr,
    BACKGROUND: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """Quality Focal Loss on probabilities: L = |d|^beta B, d = p - q, B as above.

    SQUARE: beta is 2. BACKGROUND: q is 0.
    """
    b, slope = bce_loss_grad(p, q, BACKGROUND, FAST, HALF)
    d = p
    if not BACKGROUND:
        d = p - q
    power, power_s = power_slope(d, beta, SQUARE)
    return power * b, power * slope + power_s * b


@triton.jit
def balance(q, alpha):
    """The factor that weighs positives, q > 0, against the rest: alpha, 1 - alpha."""
    return tl.where(q > 0.0, alpha, 1.0 - alpha)


@triton.jit
def log_sigmoid(log1p_e, a, x):
    """log s = x - softplus(x)."""
    return -(log1p_e + tl.where(x >= 0.0, 0.0, a))


@triton.jit
def sigmoid_power(log1p_e, w, a, r, x, gamma, SQUARE: tl.constexpr):
    """s^gamma. SQUARE: gamma is 2."""
    if SQUARE:
        s = tl.where(x >= 0.0, r, w)
        return s * s
    else:
        return tl.where(gamma == 0.0, 1.0, pow_abs(log_sigmoid(log1p_e, a, x), gamma))


@triton.jit
def background_loss_grad(
    x,
    alpha,
    gamma,
    SQUARE: tl.constexpr,
    DETACHED: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """What an element of target 0 has in nearly all of the family: L = alpha s^gamma softplus(x),
    dL/dx = alpha s^gamma (s + gamma (1 - s) softplus(x)), without the second term if the weight is
    DETACHED.
    """
    log1p_e, w, _, a, _, r = logistic(x, FAST, HALF)
    right = x >= 0.0
    b = log1p_e + tl.where(right, a, 0.0)
    slope = tl.where(right, r, w)
    weight = alpha * sigmoid_power(log1p_e, w, a, r, x, gamma, SQUARE)
    if not DETACHED:
        slope += gamma * (tl.where(right, w, r) * b)
    return weight * b, weight * slope


@triton.jit
def varifocal_loss_grad(
    x,
    q,
    weight,
    positive,
    alpha,
    gamma,
    SQUARE: tl.constexpr,
    DETACHED: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """L = w B, w = weight on positives, alpha s^gamma on the others; dL/dx = w d, on the others
    + w gamma (1 - s) B unless the weight is DETACHED. Varifocal Loss has weight = q.

    SQUARE: gamma is 2.
    """
    log1p_e, w, _, a, _, r = logistic(x, FAST, HALF)
    right = x >= 0.0
    tau = tl.where(right, 1.0 - q, q)
    b = cross_entropy(a, tau, log1p_e)
    d = tau - w
    d = tl.where(right, d, -d)
    power = sigmoid_power(log1p_e, w, a, r, x, gamma, SQUARE)
    weight = tl.where(positive, weight, alpha * power)
    if not DETACHED:
        rest = tl.where(right, w, r)  # 1 - s
        d += tl.where(positive, 0.0, gamma * (rest * b))
    return weight * b, weight * d


@triton.jit
def varifocal_probability_loss_grad(
    p,
    q,
    weight,
    positive,
    alpha,
    gamma,
    SQUARE: tl.constexpr,
    DETACHED: tl.constexpr,
    BACKGROUND: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """The same on probabilities: B as in bce_loss_grad, alpha p^gamma on the others. BACKGROUND:
    there are no positives.
    """
    b, slope = bce_loss_grad(p, q, BACKGROUND, FAST, HALF)
    power, power_s = power_slope(p, gamma, SQUARE)
    w, w_slope = alpha * power, alpha * power_s
    if not BACKGROUND:
        w = tl.where(positive, weight, w)
        w_slope = tl.where(positive, 0.0, w_slope)
    grad = w * slope
    if not DETACHED:
        grad += w_slope * b
    return w * b, grad


@triton.jit
def matchability_target(q, gamma):
    """q^gamma, what Matchability-Aware Loss trains positives to, and 0 for q <= 0. The loss of a
    saturated logit is x (1 - target): near 1 every digit counts.
    """
    zero = below_normal(q)
    return tl.where(zero, 0.0, exponential_near_one(logarithm(tl.where(zero, 1.0, q)) * gamma))


@triton.jit
def iou_aware_target(x, q, alpha, FAST: tl.constexpr, HALF: tl.constexpr):
    """max(s^alpha q^(1 - alpha), 0.01), a constant: what IA-BCE trains positives to."""
    log1p_e, w, _, a, _, r = logistic(x, FAST, HALF)
    zero = below_normal(q)
    log_q = logarithm(tl.where(zero, 1.0, q)) * (1.0 - alpha)
    log_s = tl.where(alpha == 0.0, 0.0, log_sigmoid(log1p_e, a, x) * alpha)  # 0^0 = 1
    target = exponential_near_one(log_q + log_s)
    return tl.where(zero | (target < 0.01), 0.01, target)


@triton.jit
def focal_alpha(y, alpha):
    """alpha y + (1 - alpha) (1 - y), or 1 for alpha < 0."""
    return tl.where(alpha < 0.0, 1.0, y * (alpha + alpha - 1.0) + (1.0 - alpha))


@triton.jit
def focal_loss_grad(
    x, y, alpha, gamma, SQUARE: tl.constexpr, FAST: tl.constexpr, HALF: tl.constexpr
):
    """Focal Loss: L = alpha_t m^gamma B, m = y (1 - s) + (1 - y) s; dL/dx = alpha_t m^gamma (d +
    gamma (1 - 2 y) s (1 - s) / m B). m = tau (1 - w) + (1 - tau) w, where nothing cancels, and
    (1 - 2 y) s (1 - s) / m = sign(x) (2 tau - 1) w (1 - w) / m, in which the last two are 1 - w for
    tau = 0, also where w underflows.

    SQUARE: gamma is 2.
    """
    log1p_e, w, ds, a, _, r = logistic(x, FAST, HALF)
    right = x >= 0.0
    tau = tl.where(right, 1.0 - y, y)
    b = cross_entropy(a, tau, log1p_e)
    d = tau - w  # sign(x) d
    m = tau * r + (1.0 - tau) * w
    if SQUARE:  # m^gamma; gamma m^(gamma - 1) s (1 - s)
        power = m * m
        slope = (m + m) * ds
    else:
        zero = below_normal(m)
        safe = tl.where(zero, 1.0, m)
        power = tl.where(zero, tl.where(gamma == 0.0, 1.0, 0.0), pow_abs(logarithm(safe), gamma))
        slope = gamma * (power * tl.where(tau == 0.0, r, tl.where(zero, 0.0, ds / safe)))
    factor = focal_alpha(y, alpha)
    g = factor * (power * d + (tau + tau - 1.0) * slope * b)
    return factor * power * b, tl.where(right, g, -g)


@triton.jit
def focal_probability_loss_grad(
    p,
    y,
    alpha,
    gamma,
    SQUARE: tl.constexpr,
    BACKGROUND: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """The same on probabilities: m = y (1 - p) + (1 - y) p, B as in bce_loss_grad."""
    b, slope = bce_loss_grad(p, y, BACKGROUND, FAST, HALF)
    power, power_s = power_slope(y * (1.0 - p) + (1.0 - y) * p, gamma, SQUARE)
    factor = focal_alpha(y, alpha)
    return factor * power * b, factor * (power * slope + power_s * (1.0 - (y + y)) * b)


@triton.jit
def form_loss_grad(
    x,
    q,
    positive,
    alpha,
    beta,
    BACKGROUND: tl.constexpr,
    FORM: tl.constexpr,
    DETACHED: tl.constexpr,
    UNIT: tl.constexpr,
    SQUARE: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """(loss, gradient) of an element in any form (reference.py). positive: where the weight of
    varifocal forms is that of a positive; q is 0 elsewhere. beta is the exponent, which papers call
    gamma too.

    SQUARE: beta is 2. BACKGROUND: q is 0 and nothing is positive. DETACHED, UNIT: the flags.
    """
    if FORM == PROBABILITIES_FORM:
        return quality_probability_loss_grad(x, q, beta, SQUARE, BACKGROUND, FAST, HALF)
    elif FORM == VARIFOCAL_PROBABILITIES_FORM:
        return varifocal_probability_loss_grad(
            x,
            q,
            1.0 if UNIT else q,
            positive,
            alpha,
            beta,
            SQUARE,
            DETACHED,
            BACKGROUND,
            FAST,
            HALF,
        )
    elif FORM == FOCAL_PROBABILITIES_FORM:
        return focal_probability_loss_grad(x, q, alpha, beta, SQUARE, BACKGROUND, FAST, HALF)
    elif FORM == LOGITS_FORM:
        if not SQUARE:
            return quality_loss_grad(x, q, beta, FAST)
        elif BACKGROUND:
            return quality_background_loss_grad(x, FAST, HALF)
        else:
            return quality_square_loss_grad(x, q, FAST, HALF)
    elif BACKGROUND:
        factor = alpha
        if FORM == FOCAL_FORM:
            factor = focal_alpha(0.0, alpha)
        elif FORM == IOU_AWARE_FORM:
            factor = 1.0
        elif FORM == BALANCED_FORM:
            factor = 1.0 - alpha
        CONSTANT: tl.constexpr = DETACHED or FORM == MATCHABILITY_FORM
        return background_loss_grad(x, factor, beta, SQUARE, CONSTANT, FAST, HALF)
    elif FORM == VARIFOCAL_FORM:
        return varifocal_loss_grad(
            x, q, 1.0 if UNIT else q, positive, alpha, beta, SQUARE, DETACHED, FAST, HALF
        )
    elif FORM == FOCAL_FORM:
        return focal_loss_grad(x, q, alpha, beta, SQUARE, FAST, HALF)
    elif FORM == MATCHABILITY_FORM:
        target = matchability_target(q, beta)
        return varifocal_loss_grad(x, target, 1.0, positive, alpha, beta, SQUARE, True, FAST, HALF)
    elif FORM == IOU_AWARE_FORM:
        target = tl.where(positive, iou_aware_target(x, q, alpha, FAST, HALF), q)
        return varifocal_loss_grad(x, target, 1.0, positive, 1.0, beta, SQUARE, False, FAST, HALF)
    else:
        if SQUARE:
            loss, grad = quality_square_loss_grad(x, q, FAST, HALF)
        else:
            loss, grad = quality_loss_grad(x, q, beta, FAST)
        factor = balance(q, alpha)
        return factor * loss, factor * grad


# Distribution family


@triton.jit
def split_target(t, last_bin):
    """(l, wl, wr): l = floor(t), wl = l + 1 - t, wr = t - l, with t clamped into [0, bins - 1].
    NaN weights for NaN.
    """
    t = tl.where(t < 0.0, 0.0, tl.where(t > last_bin, last_bin, t))
    left = tl.floor(t)
    return left, (left + 1.0) - t, t - left


@triton.jit
def distribution_loss(log_sum, wl, wr, z_left, z_right):
    """Distribution Focal Loss of a row out of its pieces, z shifted by its maximum: L = (wl + wr)
    log(sum_k exp(z_k)) - wl z_l - wr z_r. A side of weight 0 contributes 0 even if its z is -inf.
    """
    left = tl.where(wl == 0.0, 0.0, wl * z_left)
    right = tl.where(wr == 0.0, 0.0, wr * z_right)
    return (wl + wr) * log_sum - left - right


@triton.jit
def distribution_grad(total_p, is_left, is_right, wl, wr):
    """dL/dz_k = (wl + wr) p_k - wl [k = l] - wr [k = r], out of total_p = (wl + wr) p_k."""
    return total_p - tl.where(is_left, wl, tl.where(is_right, wr, 0.0))


@triton.jit
def expectation_grad(p, y, expectation):
    """dE/dz_k = p_k (y_k - E), E = sum_k y_k p_k. The derivative of the statistics too: y_k is then
    what comes from upstream for bin k.
    """
    return p * (y - expectation)


@triton.jit
def peak_window(bin_, peak, window):
    """1 for a bin at most `window` bins from the peak, else 0: a factor of exp(z_k), in which a NaN
    stays. The peak is the highest bin, of equals the first one.
    """
    return tl.where(tl.abs(bin_ - peak) > window, 0.0, 1.0)


@triton.jit
def entropy_term(p, s):
    """p s where p is not 0: s may be -inf there. The entropy is H = log(sum_k exp(s_k)) -
    sum_k p_k s_k, s = z shifted by its maximum; both parts are positive.
    """
    return tl.where(p == 0.0, p, p * s)


@triton.jit
def square_root_grad(root):
    """d sqrt(v) / dv = 1 / (2 sqrt(v)), 0 at v = 0, out of root = sqrt(v)."""
    zero = root == 0.0
    return tl.where(zero, 0.0, 0.5 / tl.where(zero, 1.0, root))


@triton.jit
def moments_grad(p, y, s, mean, variance, mean_s, by_mean, by_variance, by_entropy):
    """dL/dz_k = p_k (g_E (y_k - E) + g_V ((y_k - E)^2 - V) - g_H (s_k - sum_j p_j s_j)), out of
    E = sum_k p_k y_k, V = sum_k p_k (y_k - E)^2, sum_k p_k s_k, and the upstream gradients of E, of
    V (out of that of sqrt(V)) and of H.
    """
    away = y - mean
    by_p = by_mean * away + by_variance * (away * away - variance)
    return p * by_p - by_entropy * entropy_term(p, s - mean_s)


@triton.jit
def distillation_term(p_teacher, gap):
    """A term of distillation: with a = (z - max z) / T of student and teacher, p = softmax(a), the
    teacher's a constant, KL(p_t || p_s) = sum_k p_t,k (a_t,k - a_s,k) + log sum_k exp(a_s,k) -
    log sum_k exp(a_t,k). A bin of p_t = 0 has no part in it.
    """
    return tl.where(p_teacher == 0.0, p_teacher, p_teacher * gap)


@triton.jit
def distillation_loss(sum_of_terms, log_sum, log_sum_teacher):
    return sum_of_terms + (log_sum - log_sum_teacher)


@triton.jit
def distillation_grad(p, p_teacher):
    """T dKL/dz_k = p_s,k - p_t,k."""
    return p - p_teacher


# Box term. Boxes are (x1, y1, x2, y2) in units of the stride.


@triton.jit
def decode_side(SIDE: tl.constexpr, point, distance):
    """The box's coordinate at a distance from a point's: decode_box of a side."""
    if SIDE < 2:
        return point - distance
    else:
        return point + distance


@triton.jit
def clip_coordinate(x, limit):
    """x clamped into [0, limit], the image. NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, tl.where(x > limit, limit, x))


@triton.jit
def surpasses(x, high):
    """Whether x comes before the highest logit so far: it is larger, or the first NaN."""
    return (x > high) | ((x != x) & (high == high))


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """sigmoid(x), the weight of a positive."""
    e = exponential(-tl.abs(x))
    r = reciprocal(e + 1.0, FAST)
    return tl.where(x >= 0.0, r, e * r)


@triton.jit
def overlap_and_union(box, target):
    """(width, height, area, union): of the overlap, whose sides may be negative, and the areas. The
    union of a box turned inside out may be negative: callers take care of it.
    """
    width = tl.where(box[2] < target[2], box[2], target[2]) - tl.where(
        box[0] > target[0], box[0], target[0]
    )
    height = tl.where(box[3] < target[3], box[3], target[3]) - tl.where(
        box[1] > target[1], box[1], target[1]
    )
    area = tl.where(width < 0.0, 0.0, width) * tl.where(height < 0.0, 0.0, height)
    of_target = (target[2] - target[0]) * (target[3] - target[1])
    return width, height, area, (box[2] - box[0]) * (box[3] - box[1]) + of_target - area


@triton.jit
def box_iou(box, target):
    """Intersection over union, the quality of a positive."""
    _, _, area, union = overlap_and_union(box, target)
    return quotient(area, tl.where(union < 1e-6, 1e-6, union))


# Kinds of box loss, as in gfl_kernels/ops.py.
IOU, GIOU, DIOU, CIOU, CIOU_ALL = (tl.constexpr(kind) for kind in range(5))


@triton.jit
def above(a, b):
    """The derivative of max(a, b) in a; of min(a, b) it is above(b, a)."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def enclosure_side(box_low, box_high, target_low, target_high):
    """A side of the smallest box around both."""
    last = tl.where(box_high > target_high, box_high, target_high)
    side = last - tl.where(box_low < target_low, box_low, target_low)
    return tl.where(side < 0.0, 0.0, side)


@triton.jit
def coordinate_grad(
    low, high, target_low, target_high, direct, by_side, by_enclosure_side, by_extent, scale
):
    """The derivatives in a box's low and high coordinate of one axis."""
    by_low = (
        direct[0]
        - by_side * above(low, target_low)
        - by_enclosure_side * above(target_low, low)
        - by_extent
    )
    by_high = (
        direct[1]
        + by_side * above(target_high, high)
        + by_enclosure_side * above(high, target_high)
        + by_extent
    )
    return scale * by_low, scale * by_high


@triton.jit
def box_loss_grad(KIND: tl.constexpr, box, target, eps):
    """(loss, its derivatives in the box's coordinates). With O the overlap, U the union, C the
    smallest box around both, c its diagonal and rho the distance of the centres:

      IOU   -log(O / U)
      GIOU  1 - O / U + (C - U) / C
      DIOU  1 - O / U + rho^2 / c^2
      CIOU  the same + alpha v,  v = 4 / pi^2 (atan(target's w / h) - atan(w / h))^2,
            alpha = v / (1 - O / U + v) a constant, 0 where O / U <= 0.5 or v = 0; the sum is
            clamped into [0, 2]
      CIOU_ALL  the same with alpha at every O / U, and no clamp

    Derivatives are PyTorch's: half of it to each side where a minimum or maximum is a tie, 0 at the
    end of a clamp.
    """
    overlap_width, overlap_height, area, area_union = overlap_and_union(box, target)
    width = box[2] - box[0]
    height = box[3] - box[1]

    # L depends on the overlap's sides, the box's area, the sides of C, and directly on the box.
    CLAMPED: tl.constexpr = KIND == IOU or KIND == GIOU  # U = max(U, eps), else U + eps
    if CLAMPED:
        union_slope = tl.where(area_union > eps, 1.0, 0.0)
        area_union = tl.where(area_union < eps, eps, area_union)
    else:
        union_slope = 1.0
        area_union = area_union + eps
    iou = quotient(area, area_union)
    by_union = union_slope * quotient(iou, area_union)  # of 1 - iou
    zero = tl.zeros_like(area)
    direct_x, direct_y = (zero, zero), (zero, zero)  # of the low and the high side
    if KIND == IOU:
        ratio = tl.where(iou < eps, eps, iou)
        slope = quotient(tl.where(iou > eps, 1.0, 0.0).to(iou.dtype), ratio)
        loss = -logarithm(ratio)
        by_area = slope * by_union
        by_overlap = quotient(-slope, area_union) - by_area
        by_enclosure_width, by_enclosure_height = zero, zero
    else:
        enclosure_width = enclosure_side(box[0], box[2], target[0], target[2])
        enclosure_height = enclosure_side(box[1], box[3], target[1], target[3])
        if KIND == GIOU:
            product = enclosure_width * enclosure_height
            enclosure = tl.where(product < eps, eps, product)
            loss = 1.0 - (iou - quotient(enclosure - area_union, enclosure))
            by_area = by_union - quotient(union_slope.to(iou.dtype), enclosure)
            by_overlap = quotient(-1.0 + zero, area_union) - by_area
            by_enclosure = quotient(quotient(area_union, enclosure), enclosure)
            by_enclosure = tl.where(product > eps, by_enclosure, 0.0)
            by_enclosure_width = by_enclosure * enclosure_height
            by_enclosure_height = by_enclosure * enclosure_width
        else:
            dx = (target[0] + target[2]) - (box[0] + box[2])
            dy = (target[1] + target[3]) - (box[1] + box[3])
            square = enclosure_width * enclosure_width + enclosure_height * enclosure_height + eps
            part = quotient((dx * dx + dy * dy) * 0.25, square)
            loss = 1.0 - (iou - part)
            by_area = by_union
            by_overlap = quotient(-1.0 + zero, area_union) - by_area
            by_square = quotient(-2.0 * part, square)
            by_enclosure_width = by_square * enclosure_width
            by_enclosure_height = by_square * enclosure_height
            by_x = quotient(-0.5 * dx, square)
            by_y = quotient(-0.5 * dy, square)
            direct_x, direct_y = (by_x, by_x), (by_y, by_y)
            if KIND != DIOU:
                tall = height + eps
                target_ratio = quotient(target[2] - target[0], target[3] - target[1] + eps)
                angle = arctangent(target_ratio) - arctangent(quotient(width, tall))
                v = 0.4052847345693511 * (angle * angle)  # 4 / pi^2
                alpha = quotient(v, tl.where(v > 0.0, (1.0 - iou) + v, 1.0))
                if KIND == CIOU:
                    alpha = tl.where(iou > 0.5, alpha, 0.0)
                loss = loss + alpha * v
                by_ratio = quotient(
                    -0.8105694691387022 * (alpha * angle), width * width + tall * tall
                )
                direct_x = (by_x - by_ratio * tall, by_x + by_ratio * tall)
                direct_y = (by_y + by_ratio * width, by_y - by_ratio * width)

    scale = 1.0
    if KIND == CIOU:
        scale = tl.where((loss <= 0.0) | (loss >= 2.0), 0.0, 1.0)
        loss = tl.where(loss < 0.0, 0.0, tl.where(loss > 2.0, 2.0, loss))
    # A side of the overlap or of C that was cut off at 0 stands still.
    wide = overlap_width > 0.0
    high = overlap_height > 0.0
    by_width = tl.where(wide, by_overlap * tl.where(high, overlap_height, 0.0), 0.0)
    by_height = tl.where(high, by_overlap * tl.where(wide, overlap_width, 0.0), 0.0)
    x = coordinate_grad(
        box[0], box[2], target[0], target[2], direct_x, by_width, by_enclosure_width,
        by_area * height, scale,
    )  # fmt: skip
    y = coordinate_grad(
        box[1], box[3], target[1], target[3], direct_y, by_height, by_enclosure_height,
        by_area * width, scale,
    )  # fmt: skip
    return loss, (x[0], y[0], x[1], y[1])
