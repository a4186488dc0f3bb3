/* gfl_kernels for C and C++: the kernels on strided views, without Python and without a tensor
 * class.
 *
 * A view describes memory that the caller owns. Sizes and strides are in elements and follow
 * PyTorch's conventions, stride 0 included, so a torch::Tensor t becomes
 *
 *   gfl_view{t.data_ptr(), GFL_FLOAT32, (int32_t)t.dim(), t.sizes().data(), t.strides().data()}
 *
 * Functions return 0, or a nonzero value with the reason in gfl_last_error() (per thread).
 * Arguments are checked for what memory safety needs: dtypes, sizes, null pointers.
 *
 * gfl_*_cpu run on libtorch's thread pool. gfl_*_cuda take views of device memory, launch on the
 * current device and on `stream` (a cudaStream_t), and return without waiting. A loss that is a sum
 * over rows needs GFL_CUDA_WORKSPACE_BYTES of device memory that no other call uses until the
 * stream is done with this one. A library built without CUDA refuses them.
 */
#ifndef GFL_KERNELS_H_
#define GFL_KERNELS_H_

#include <stdint.h>

#if defined(_WIN32) && defined(gfl_native_EXPORTS) /* CMake defines it in the library itself */
#define GFL_API __declspec(dllexport)
#elif defined(_WIN32)
#define GFL_API __declspec(dllimport)
#else
#define GFL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  GFL_FLOAT32,
  GFL_FLOAT64,
  GFL_BFLOAT16,
  GFL_FLOAT16,
  GFL_INT64,
  GFL_INT32,
  GFL_INT16,
  GFL_INT8,
  GFL_UINT8,
  GFL_BOOL
} gfl_dtype;

typedef struct {
  void* data;
  gfl_dtype dtype;
  int32_t ndim;
  const int64_t* sizes;
  const int64_t* strides;
} gfl_view;

/* A loss of the quality family, with s the sigmoid of the logit x and B binary cross entropy; on
 * probabilities s = x. Positive is the class that a label names, or without labels what has q > 0.
 */
typedef enum {
  /* Quality Focal Loss: |s - q|^beta B(x, q). */
  GFL_LOGITS = 0,
  GFL_PROBABILITIES = 1,
  /* q B(x, q) on positives, alpha s^beta B(x, 0) on the others. */
  GFL_VARIFOCAL = 2,
  GFL_VARIFOCAL_PROBABILITIES = 3,
  /* a m^beta B(x, q), m = q (1 - s) + (1 - q) s, a = alpha q + (1 - alpha) (1 - q); a = 1 for
   * alpha < 0. */
  GFL_FOCAL = 4,
  GFL_FOCAL_PROBABILITIES = 5,
  /* B(x, q^beta) on positives, alpha s^beta B(x, 0) on the others, whose weight is a constant. */
  GFL_MATCHABILITY = 6,
  /* B(x, t) on positives with a constant t = max(s^alpha q^(1 - alpha), 0.01), s^beta B(x, 0) on
   * the others. */
  GFL_IOU_AWARE = 7,
  /* Quality Focal Loss, alpha times where q > 0 and 1 - alpha times elsewhere. */
  GFL_BALANCED = 8
} gfl_form;

/* Of GFL_VARIFOCAL*: the weight is a constant of the derivative; positives have weight 1. */
enum { GFL_DETACH_WEIGHT = 1, GFL_UNIT_POSITIVES = 2 };

/* A loss of the quality family, summed over the classes of each row. Loss and gradient are
 * multiplied by scale and, with avg_factor, divided by avg_factor + eps(float32). Optional views
 * may be NULL. */
typedef struct {
  const gfl_view* pred;   /* [..., C]  float32, float64, bfloat16 or float16 */
  const gfl_view* target; /* [...] labels, outside [0, C) is background; or [..., C] qualities if
                             score is NULL */
  const gfl_view* score;  /* [...]     optional */
  const gfl_view* weight; /* [...] or [..., C]  optional; what has weight 0 contributes exactly 0 */
  const gfl_view* avg_factor; /* one element, optional */
  const gfl_view* grad_loss;  /* upstream gradient, [...] or [] in the loss's dtype, optional (1) */
  const gfl_view*
      loss; /* [...] per row or [] for the sum, optional; float32, float64 for float64 */
  const gfl_view* grad; /* [..., C] in pred's dtype, optional */
  int32_t form;         /* a gfl_form */
  double beta;
  double scale;
  double alpha; /* of forms that have one */
  int32_t flags;
} gfl_quality_args;

#define GFL_CUDA_WORKSPACE_BYTES 32768

GFL_API int gfl_quality_cpu(const gfl_quality_args* args);
GFL_API int gfl_quality_cuda(const gfl_quality_args* args, void* workspace, void* stream);

/* Distribution Focal Loss: L = (wl + wr) lse(z) - wl z_l - wr z_r, with l = floor(t), wl = l + 1 -
 * t, wr = t - l and t clamped into [0, K - 1]; or with explicit l, wl, wr. */
typedef struct {
  const gfl_view* pred;         /* [..., K] */
  const gfl_view* target;       /* [...] position in bins, or the left bin with explicit weights */
  const gfl_view* weight_left;  /* [...] optional, together with weight_right */
  const gfl_view* weight_right; /* [...] optional */
  const gfl_view* weight;       /* [...] optional */
  const gfl_view* avg_factor;   /* one element, optional */
  const gfl_view* grad_loss;    /* [...] or [], optional (1) */
  const gfl_view* loss;         /* [...] or [], optional */
  const gfl_view* grad;         /* [..., K], optional */
  double scale;
} gfl_distribution_args;

GFL_API int gfl_distribution_cpu(const gfl_distribution_args* args);
GFL_API int gfl_distribution_cuda(const gfl_distribution_args* args, void* workspace, void* stream);

/* What an Integral is over: all bins, or those at most `window` from the highest one. */
typedef enum { GFL_INTEGRAL_MEAN = 0, GFL_INTEGRAL_PEAK = 1 } gfl_integral_mode;

/* Integral: E = sum_k y_k softmax(z)_k, y = 0, 1, ... without bins.
 *
 * saved: what a call that writes out leaves for a later one that writes grad, of the same pred and
 * bins: each row's E and 1 / sum_k exp(z_k), or 0 where the latter is of no use. With it the
 * gradient of rows without gaps needs no sums. On CPUs alone. */
typedef struct {
  const gfl_view* pred;     /* [..., K] */
  const gfl_view* bins;     /* [K] optional */
  const gfl_view* grad_out; /* [...] upstream gradient, needed with grad */
  const gfl_view* out;      /* [...] optional; float32, float64 for float64 */
  const gfl_view* grad;     /* [..., K] optional */
  const gfl_view* saved;    /* [..., 2] optional, out's dtype; written with out, else read */
  int32_t mode;             /* a gfl_integral_mode */
  int32_t window;           /* of GFL_INTEGRAL_PEAK, >= 0 */
} gfl_integral_args;

GFL_API int gfl_integral_cpu(const gfl_integral_args* args);
GFL_API int gfl_integral_cuda(const gfl_integral_args* args, void* stream);

/* Statistics: the topk highest of softmax(z) in descending order, and with add_mean their mean. */
typedef struct {
  const gfl_view* pred;     /* [..., K] */
  const gfl_view* grad_out; /* [..., topk (+ 1)] upstream gradient, needed with grad */
  const gfl_view* out;      /* [..., topk (+ 1)] optional; float32, float64 for float64 */
  const gfl_view* grad;     /* [..., K] optional */
  int32_t topk;             /* 1 to K */
  int32_t add_mean;         /* 0 or 1 */
} gfl_statistics_args;

GFL_API int gfl_statistics_cpu(const gfl_statistics_args* args);
GFL_API int gfl_statistics_cuda(const gfl_statistics_args* args, void* stream);

/* Moments: E = sum_k y_k p_k, sqrt(sum_k p_k (y_k - E)^2) and the entropy -sum_k p_k log p_k, with
 * p = softmax(z) and y = 0, 1, ... without bins. */
typedef struct {
  const gfl_view* pred;     /* [..., K] */
  const gfl_view* bins;     /* [K] optional */
  const gfl_view* grad_out; /* [..., 3] upstream gradient, needed with grad */
  const gfl_view* out;      /* [..., 3] optional; float32, float64 for float64 */
  const gfl_view* grad;     /* [..., K] optional */
} gfl_moments_args;

GFL_API int gfl_moments_cpu(const gfl_moments_args* args);
GFL_API int gfl_moments_cuda(const gfl_moments_args* args, void* stream);

/* The box loss: -log IoU, GIoU, DIoU, CIoU, CIoU at every IoU. */
typedef enum { GFL_IOU, GFL_GIOU, GFL_DIOU, GFL_CIOU, GFL_CIOU_ALL } gfl_iou;

/* The losses of a detection head over the levels of a pyramid. A list is an array of `levels`
 * views; a level has n cells in one dimension or in two, and A is the sum of all n. Without targets
 * a label in [0, C) is positive, the weight of a positive is its highest score, and Quality Focal
 * Loss trains that class to the quality; with targets, labels are a mask, the weight is the sum of
 * the anchor's targets, and the targets are what all classes are trained to. */
typedef struct {
  int32_t levels;
  const gfl_view* cls;           /* [B, ..., C] logits */
  const gfl_view* box;           /* [B, ..., 4 K] logits */
  const gfl_view* points;        /* [n, 2] pixels */
  const gfl_view* labels;        /* [B, n] */
  const gfl_view* box_targets;   /* [B, n, 4] x1 y1 x2 y2, pixels */
  const gfl_view* targets;       /* [B, ..., C], optional */
  const gfl_view* label_weights; /* [B, n], optional */
  const double* strides;         /* of the levels, in pixels */
  int32_t iou;                   /* a gfl_iou */
  double iou_eps;
  double limit; /* the largest target of the DFL, in bins */
  /* These are float64 if cls and box are, else float32, without gaps. gfl_head_boxes_* write them,
   * gfl_head_* read them; boxes only if it is there. */
  const gfl_view* quality;     /* [B, A] IoU of positives, 0 elsewhere */
  const gfl_view* weight;      /* [B, A] of positives, 0 elsewhere */
  const gfl_view* sums;        /* [levels, 2] weighted box loss and DFL */
  const gfl_view* normalisers; /* [2] divisors: the sum over images of max(positives, 1), with
                                  targets that of the weights; the sum of the weights */
  const gfl_view* boxes;       /* [B, A, 4] pixels, of positives, 0 elsewhere; optional */
  /* For gfl_head_*: three losses and three arrays [levels], of classes, box and DFL. form, alpha
   * and beta are those of gfl_quality_args; Varifocal Loss needs targets. */
  int32_t form;
  double alpha;
  double beta;
  double loss_weights[3];
  const gfl_view* losses[6];      /* all or none */
  const gfl_view* grad_losses[6]; /* upstream gradients, optional; with losses they are 1, 1, 1 */
  const gfl_view* grad_cls;       /* arrays of views, optional, both or none */
  const gfl_view* grad_box;
} gfl_head_args;

GFL_API int gfl_head_boxes_cpu(const gfl_head_args* args);
GFL_API int gfl_head_cpu(const gfl_head_args* args);

/* On CUDA a head has at most 12 levels, each list one dtype, and the workspace the size that the
 * first function says; -1 if it fails. */
GFL_API int64_t gfl_head_cuda_workspace_bytes(const gfl_head_args* args);
GFL_API int gfl_head_boxes_cuda(const gfl_head_args* args, void* workspace, void* stream);
GFL_API int gfl_head_cuda(const gfl_head_args* args, void* workspace, void* stream);

/* Distillation: L = KL(softmax(teacher / temperature) || softmax(pred / temperature)) of each row,
 * the teacher a constant. */
typedef struct {
  const gfl_view* pred;       /* [..., K] */
  const gfl_view* teacher;    /* [..., K] logits in pred's dtype */
  const gfl_view* weight;     /* [...] optional */
  const gfl_view* avg_factor; /* one element, optional */
  const gfl_view* grad_loss;  /* [...] or [], optional (1) */
  const gfl_view* loss;       /* [...] or [], optional */
  const gfl_view* grad;       /* [..., K], optional */
  double temperature;
  double scale;
} gfl_distillation_args;

GFL_API int gfl_distillation_cpu(const gfl_distillation_args* args);
GFL_API int gfl_distillation_cuda(const gfl_distillation_args* args, void* workspace, void* stream);

/* Distributions to boxes: x1, y1, x2, y2 = the point less and plus stride * E of the sides left,
 * top, right and bottom, clipped to [0, width] and [0, height]; with cls the highest sigmoid of
 * each row and its class. Results are float32, float64 for float64. */
typedef struct {
  const gfl_view* pred;      /* [..., 4 K]  side * K + bin; float32, float64, bfloat16 or float16 */
  const gfl_view* points;    /* [..., 2]    x, y */
  const gfl_view* strides;   /* [...]       optional, instead of stride */
  const gfl_view* bins;      /* [K]         optional: 0, 1, ...; in the dtype of the results */
  const gfl_view* cls;       /* [..., C]    optional logits, float64 if pred is */
  const gfl_view* limits;    /* [..., 2]    optional, instead of height and width */
  const gfl_view* boxes;     /* [..., 4] */
  const gfl_view* deviation; /* [..., 4]    optional: stride * standard deviation of the sides */
  const gfl_view* score;     /* [...]       with cls */
  const gfl_view* label;     /* [...]       with cls, int64 */
  double stride;
  double height, width; /* negative: boxes are not clipped */
  int64_t window;       /* E of the bins at most so many from the highest; negative: of all */
} gfl_decode_args;

GFL_API int gfl_decode_cpu(const gfl_decode_args* args);
GFL_API int gfl_decode_cuda(const gfl_decode_args* args, void* stream);

GFL_API const char* gfl_last_error(void);

/* "0.1.0" */
GFL_API const char* gfl_version(void);
/* How the library was built, as JSON. */
GFL_API const char* gfl_build_info(void);
/* The instruction set in use, "baseline", "avx2" or "avx512": the best the machine has, or what
 * GFL_CPU_ISA names. NULL with gfl_last_error() if GFL_CPU_ISA names one that cannot run. */
GFL_API const char* gfl_cpu_isa(void);
/* What GFL_CPU_ISA may name here, comma separated. */
GFL_API const char* gfl_available_isas(void);
/* Why gfl_*_cuda cannot run: built without CUDA, no driver or one that is too old. NULL if nothing
 * is known to be in the way. Initialises no device. */
GFL_API const char* gfl_cuda_obstacle(void);

#ifdef __cplusplus
}
#endif

#endif /* GFL_KERNELS_H_ */
