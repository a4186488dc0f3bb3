// Calls the kernels through the C interface on a few numbers and compares values and gradients
// with the formulas, evaluated here in double. Prints the instruction set and the worst error;
// exits 1 on a mismatch.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#include "gfl_kernels/gfl_kernels.h"

namespace {

constexpr double kTolerance = 1e-5;  // the kernels run in float32 here
double worst_error = 0;

// A contiguous view that owns its sizes and strides.
class View {
 public:
  View(void* data, gfl_dtype dtype, std::initializer_list<int64_t> sizes)
      : sizes_(sizes), strides_(sizes_.size(), 1) {
    for (size_t i = sizes_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * sizes_[i];
    view_ = {data, dtype, static_cast<int32_t>(sizes_.size()), sizes_.data(), strides_.data()};
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  const gfl_view* get() const { return &view_; }

 private:
  std::vector<int64_t> sizes_, strides_;
  gfl_view view_;
};

void require_ok(int status) {
  if (status == 0) return;
  std::printf("error: %s\n", gfl_last_error());
  std::exit(1);
}

void expect(const std::string& what, double got, double truth) {
  const double error = std::fabs(got - truth) / (1 + std::fabs(truth));
  if (!(error <= kTolerance)) {
    std::printf("%s: got %.9g, expected %.9g\n", what.c_str(), got, truth);
    std::exit(1);
  }
  worst_error = std::fmax(worst_error, error);
}

double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }

std::vector<double> softmax(const float* z, int bins) {
  double sum = 0;
  std::vector<double> p(bins);
  for (int k = 0; k < bins; ++k) sum += p[k] = std::exp(double(z[k]));
  for (double& value : p) value /= sum;
  return p;
}

// L = d^2 B with d = s - q, B = q softplus(-x) + (1 - q) softplus(x); dL/dx = d^2 d + 2 d s (1 - s)
// B.
void quality() {
  constexpr int N = 3, C = 4;
  float x[N][C] = {
      {0.5f, -1.25f, 3.0f, -6.0f}, {-0.75f, 2.0f, 0.0f, 1.5f}, {8.0f, -8.0f, 0.25f, -0.25f}};
  int64_t label[N] = {2, 4, 0};  // 4 == C is background
  float score[N] = {0.7f, 0.9f, 0.25f};
  float weight[N] = {1.0f, 0.5f, 2.0f};
  float loss[N], grad[N][C];
  View pred(x, GFL_FLOAT32, {N, C}), target(label, GFL_INT64, {N}), q(score, GFL_FLOAT32, {N}),
      w(weight, GFL_FLOAT32, {N}), out(loss, GFL_FLOAT32, {N}), g(grad, GFL_FLOAT32, {N, C});
  gfl_quality_args args = {};
  args.pred = pred.get();
  args.target = target.get();
  args.score = q.get();
  args.weight = w.get();
  args.loss = out.get();
  args.grad = g.get();
  args.form = GFL_LOGITS;
  args.beta = 2;
  args.scale = 0.5;
  require_ok(gfl_quality_cpu(&args));
  for (int i = 0; i < N; ++i) {
    double row = 0;
    for (int c = 0; c < C; ++c) {
      const double t = label[i] == c ? score[i] : 0.0, s = 1 / (1 + std::exp(-double(x[i][c])));
      const double d = s - t, bce = t * softplus(-x[i][c]) + (1 - t) * softplus(x[i][c]);
      row += d * d * bce;
      expect("quality gradient", grad[i][c],
             args.scale * weight[i] * (d * d * d + 2 * d * s * (1 - s) * bce));
    }
    expect("quality loss", loss[i], args.scale * weight[i] * row);
  }

  // L = w B, w = q where q > 0, else alpha s^gamma.
  args.form = GFL_VARIFOCAL;
  args.alpha = 0.75;
  require_ok(gfl_quality_cpu(&args));
  for (int i = 0; i < N; ++i) {
    double row = 0;
    for (int c = 0; c < C; ++c) {
      const double t = label[i] == c ? score[i] : 0.0, s = 1 / (1 + std::exp(-double(x[i][c])));
      const double bce = t * softplus(-x[i][c]) + (1 - t) * softplus(x[i][c]);
      const double factor = t > 0 ? t : args.alpha * s * s;
      row += factor * bce;
      expect("varifocal gradient", grad[i][c],
             args.scale * weight[i] * factor * (s - t + (t > 0 ? 0 : 2 * (1 - s) * bce)));
    }
    expect("varifocal loss", loss[i], args.scale * weight[i] * row);
  }
}

// L = lse(z) - wl z_l - wr z_r with l = floor(t), wr = t - l, wl = 1 - wr; dL/dz_k = p_k - wl[k=l]
// - wr[k=r].
void distribution() {
  constexpr int N = 2, K = 5;
  float z[N][K] = {{0.5f, -1.0f, 2.0f, 0.0f, 1.0f}, {-2.0f, 3.0f, 0.25f, -0.5f, 1.75f}};
  float position[N] = {2.25f, 0.5f};
  float loss = 0, grad[N][K];
  View pred(z, GFL_FLOAT32, {N, K}), target(position, GFL_FLOAT32, {N}),
      out(&loss, GFL_FLOAT32, {}), g(grad, GFL_FLOAT32, {N, K});
  gfl_distribution_args args = {};
  args.pred = pred.get();
  args.target = target.get();
  args.loss = out.get();
  args.grad = g.get();
  args.scale = 1.0 / N;
  require_ok(gfl_distribution_cpu(&args));
  double sum = 0;
  for (int i = 0; i < N; ++i) {
    const int left = static_cast<int>(position[i]);
    const double wr = position[i] - left, wl = 1 - wr;
    const std::vector<double> p = softmax(z[i], K);
    sum -= wl * std::log(p[left]) + wr * std::log(p[left + 1]);
    for (int k = 0; k < K; ++k) {
      const double hit = k == left ? wl : k == left + 1 ? wr : 0;
      expect("distribution gradient", grad[i][k], args.scale * (p[k] - hit));
    }
  }
  expect("distribution loss", loss, args.scale * sum);
}

// E = sum_k k p_k; dE/dz_k = p_k (k - E).
void integral() {
  constexpr int N = 2, K = 5;
  float z[N][K] = {{0.5f, -1.0f, 2.0f, 0.0f, 1.0f}, {-2.0f, 3.0f, 0.25f, -0.5f, 1.75f}};
  float upstream[N] = {1.0f, -0.5f};
  float value[N], grad[N][K];
  View pred(z, GFL_FLOAT32, {N, K}), grad_out(upstream, GFL_FLOAT32, {N}),
      out(value, GFL_FLOAT32, {N}), g(grad, GFL_FLOAT32, {N, K});
  gfl_integral_args args = {};
  args.pred = pred.get();
  args.grad_out = grad_out.get();
  args.out = out.get();
  args.grad = g.get();
  require_ok(gfl_integral_cpu(&args));
  for (int i = 0; i < N; ++i) {
    const std::vector<double> p = softmax(z[i], K);
    double mean = 0;
    for (int k = 0; k < K; ++k) mean += k * p[k];
    expect("integral", value[i], mean);
    for (int k = 0; k < K; ++k)
      expect("integral gradient", grad[i][k], upstream[i] * p[k] * (k - mean));
  }
}

// The two highest p and their mean; g_z = p (g_p - sum g_p p).
void statistics() {
  constexpr int K = 4;
  float z[K] = {0.5f, 3.0f, -1.0f, 2.0f};
  float upstream[3] = {1.0f, -0.5f, 0.25f};
  float value[3], grad[K];
  View pred(z, GFL_FLOAT32, {1, K}), grad_out(upstream, GFL_FLOAT32, {1, 3}),
      out(value, GFL_FLOAT32, {1, 3}), g(grad, GFL_FLOAT32, {1, K});
  gfl_statistics_args args = {};
  args.pred = pred.get();
  args.grad_out = grad_out.get();
  args.out = out.get();
  args.grad = g.get();
  args.topk = 2;
  args.add_mean = 1;
  require_ok(gfl_statistics_cpu(&args));
  const std::vector<double> p = softmax(z, K);
  expect("statistics", value[0], p[1]);
  expect("statistics", value[1], p[3]);
  expect("statistics", value[2], (p[1] + p[3]) / 2);
  const double by_p[K] = {0, upstream[0] + upstream[2] / 2, 0, upstream[1] + upstream[2] / 2};
  for (int k = 0; k < K; ++k) {
    expect("statistics gradient", grad[k], p[k] * (by_p[k] - by_p[1] * p[1] - by_p[3] * p[3]));
  }
}

// E, sqrt(V) and H; of the first two, g_z = p ((y - E) g_E + ((y - E)^2 - V) / (2 sqrt(V)) g_std).
void moments() {
  constexpr int K = 4;
  float z[K] = {0.5f, 3.0f, -1.0f, 2.0f}, y[K] = {-1.0f, 0.0f, 2.0f, 5.0f};
  float upstream[3] = {1.0f, -0.5f, 0.0f};
  float value[3], grad[K];
  View pred(z, GFL_FLOAT32, {1, K}), bins(y, GFL_FLOAT32, {K}),
      grad_out(upstream, GFL_FLOAT32, {1, 3}), out(value, GFL_FLOAT32, {1, 3}),
      g(grad, GFL_FLOAT32, {1, K});
  gfl_moments_args args = {};
  args.pred = pred.get();
  args.bins = bins.get();
  args.grad_out = grad_out.get();
  args.out = out.get();
  args.grad = g.get();
  require_ok(gfl_moments_cpu(&args));
  const std::vector<double> p = softmax(z, K);
  double mean = 0, variance = 0, entropy = 0;
  for (int k = 0; k < K; ++k) mean += p[k] * y[k];
  for (int k = 0; k < K; ++k) variance += p[k] * (y[k] - mean) * (y[k] - mean);
  for (int k = 0; k < K; ++k) entropy -= p[k] * std::log(p[k]);
  const double std = std::sqrt(variance);
  expect("mean", value[0], mean);
  expect("standard deviation", value[1], std);
  expect("entropy", value[2], entropy);
  for (int k = 0; k < K; ++k) {
    const double away = y[k] - mean;
    const double slope = upstream[0] * away + upstream[1] * (away * away - variance) / (2 * std);
    expect("moments gradient", grad[k], p[k] * slope);
  }
}

// KL divergence of a distribution from itself and from another, and its gradient.
void distillation() {
  constexpr int N = 2, K = 3;
  float z[N][K] = {{0.5f, -1, 2}, {1, 0, -2}}, teacher[N][K] = {{0.5f, -1, 2}, {-1, 2, 0.5f}},
        loss[N], grad[N][K];
  View pred(z, GFL_FLOAT32, {N, K}), t(teacher, GFL_FLOAT32, {N, K}), out(loss, GFL_FLOAT32, {N}),
      g(grad, GFL_FLOAT32, {N, K});
  gfl_distillation_args args = {};
  args.pred = pred.get();
  args.teacher = t.get();
  args.loss = out.get();
  args.grad = g.get();
  args.temperature = 1;
  args.scale = 0.5;
  require_ok(gfl_distillation_cpu(&args));
  for (int i = 0; i < N; ++i) {
    const std::vector<double> p = softmax(z[i], K), q = softmax(teacher[i], K);
    double divergence = 0;
    for (int k = 0; k < K; ++k) divergence += q[k] * std::log(q[k] / p[k]);
    expect("distillation", loss[i], 0.5 * divergence);
    for (int k = 0; k < K; ++k) {
      expect("distillation gradient", grad[i][k], 0.5 * (p[k] - q[k]));
    }
  }
}

// A box of equal logits about a point, clipped on its right, and the best of two classes.
void decode() {
  constexpr int K = 5;
  float z[4 * K] = {}, point[2] = {20, 30}, cls[2] = {-1, 3}, box[4], deviation[4], score;
  int64_t label;
  View pred(z, GFL_FLOAT32, {1, 4 * K}), p(point, GFL_FLOAT32, {1, 2}), c(cls, GFL_FLOAT32, {1, 2}),
      b(box, GFL_FLOAT32, {1, 4}), d(deviation, GFL_FLOAT32, {1, 4}), s(&score, GFL_FLOAT32, {1}),
      l(&label, GFL_INT64, {1});
  gfl_decode_args args = {};
  args.pred = pred.get();
  args.points = p.get();
  args.cls = c.get();
  args.boxes = b.get();
  args.deviation = d.get();
  args.score = s.get();
  args.label = l.get();
  args.stride = 8;
  args.height = 50;
  args.width = 30;
  args.window = -1;
  require_ok(gfl_decode_cpu(&args));
  const double expected[] = {20 - 16, 30 - 16, 30, 30 + 16};
  for (int side = 0; side < 4; ++side) {
    expect("decoded box", box[side], expected[side]);
    expect("deviation", deviation[side], 8 * std::sqrt(2.0));
  }
  expect("score", score, 1 / (1 + std::exp(-3.0)));
  expect("label", static_cast<double>(label), 1);
}

// Two anchors of equal logits, one positive whose box is the target: IoU 1, GIoU loss 0, log K a
// side; every class at |s - q| = 1 / 2 and log 2.
void head() {
  constexpr int A = 2, C = 3, K = 16;
  float cls[A][C] = {}, box[A][4 * K] = {}, point[A][2] = {{20, 20}, {28, 20}};
  int64_t label[A] = {1, C};
  float target[A][4] = {{5, 5, 35, 35}, {}};  // 7.5 strides of 2 about the point
  const double stride = 2;
  float quality[A], weight[A], sums[2], normalisers[2], losses[6], cls_grad[A][C],
      box_grad[A][4 * K], boxes[A][4];
  View x(cls, GFL_FLOAT32, {1, A, C}), z(box, GFL_FLOAT32, {1, A, 4 * K}),
      p(point, GFL_FLOAT32, {A, 2}), l(label, GFL_INT64, {1, A}), t(target, GFL_FLOAT32, {1, A, 4}),
      q(quality, GFL_FLOAT32, {1, A}), w(weight, GFL_FLOAT32, {1, A}), s(sums, GFL_FLOAT32, {1, 2}),
      n(normalisers, GFL_FLOAT32, {2}), b(boxes, GFL_FLOAT32, {1, A, 4}),
      gx(cls_grad, GFL_FLOAT32, {1, A, C}), gz(box_grad, GFL_FLOAT32, {1, A, 4 * K});
  gfl_head_args args = {};
  args.levels = 1;
  args.cls = x.get();
  args.box = z.get();
  args.points = p.get();
  args.labels = l.get();
  args.box_targets = t.get();
  args.strides = &stride;
  args.iou = GFL_GIOU;
  args.iou_eps = 1e-6;
  args.limit = K - 1.1;
  args.quality = q.get();
  args.weight = w.get();
  args.sums = s.get();
  args.normalisers = n.get();
  args.boxes = b.get();
  require_ok(gfl_head_boxes_cpu(&args));
  expect("head quality", quality[0], 1);
  expect("head quality of background", quality[1], 0);
  expect("head weight", weight[0], 0.5);
  expect("head positives", normalisers[0], 1);
  for (int side = 0; side < 4; ++side) expect("head box", boxes[0][side], target[0][side]);

  args.beta = 2;
  args.loss_weights[0] = 1;
  args.loss_weights[1] = 2;
  args.loss_weights[2] = 0.25;
  std::vector<View*> outputs;
  for (int i = 0; i < 6; ++i) {
    outputs.push_back(i < 3 ? new View(losses + i, GFL_FLOAT32, {})
                            : new View(losses + i, GFL_FLOAT32, {1}));
    args.losses[i] = outputs.back()->get();
  }
  args.grad_cls = gx.get();
  args.grad_box = gz.get();
  require_ok(gfl_head_cpu(&args));
  for (const View* view : outputs) delete view;
  for (int level = 0; level < 6; level += 3) {
    expect("head loss_cls", losses[level], A * C * 0.25 * std::log(2.0));
    expect("head loss_bbox", losses[level + 1], 0);
    expect("head loss_dfl", losses[level + 2], 0.25 * 0.5 * 4 * std::log(double(K)));
  }
  expect("head gradient of a class", cls_grad[0][1], -0.125 - 0.25 * std::log(2.0));
  expect("head gradient of a bin", box_grad[0][0], 0.25 * 0.5 / K);
  for (const float value : box_grad[1]) expect("head gradient of background", value, 0);
}

// What does not fit together is refused with a reason, and nothing is written.
void refusal() {
  float x[2][3] = {}, loss[2] = {-1, -1};
  int64_t label[3] = {0, 1, 2};
  View pred(x, GFL_FLOAT32, {2, 3}), target(label, GFL_INT64, {3}), out(loss, GFL_FLOAT32, {2});
  float score[2] = {1, 1};
  View q(score, GFL_FLOAT32, {2});
  gfl_quality_args args = {};
  args.pred = pred.get();
  args.target = target.get();
  args.score = q.get();
  args.loss = out.get();
  args.beta = 2;
  args.scale = 1;
  const bool refused = gfl_quality_cpu(&args) != 0 && gfl_last_error()[0] != '\0';
  if (!refused || loss[0] != -1) {
    std::printf("three labels for two rows were not refused\n");
    std::exit(1);
  }
}

}  // namespace

int main() {
  const char* isa = gfl_cpu_isa();
  if (isa == nullptr) {
    std::printf("error: %s\n", gfl_last_error());
    return 1;
  }
  quality();
  distribution();
  integral();
  statistics();
  moments();
  distillation();
  decode();
  head();
  refusal();
  std::printf("gfl_kernels %s on %s: worst error %.2g\n", gfl_version(), isa, worst_error);
  return 0;
}
