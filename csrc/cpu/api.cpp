// The C functions of gfl_kernels.h: checks what memory safety needs, merges dimensions, cuts the
// rows into blocks and runs them on libtorch's threads. ops.cpp goes through here too; the losses
// of a whole head are in head_api.cpp.
#include "api.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../error.h"
#include "gfl_kernels/gfl_kernels.h"

namespace gfl {

namespace {
thread_local std::string last_error;
}

void set_error(std::string message) { last_error = std::move(message); }

namespace {

// Elements of a block; a block's sum does not depend on the number of threads, nor does the order
// of the blocks.
constexpr int64_t kBlock = 16 * kTile;
// Elements that are worth a thread, some 6 us of work. Below twice that the call stays on one, as
// do torch's own loops.
constexpr int64_t kGrain = 16384;

// Bytes of a gradient from which on it is written past the caches, which would not keep it until it
// is read: a write that goes through them first reads what it overwrites. As in glibc's memcpy,
// whose bound is a core's share of the last cache.
constexpr int64_t kStreamed = int64_t{8} << 20;

double scale_of(double scale, const gfl_view* avg_factor) {
  if (!avg_factor) return scale;
  int64_t count = 1;
  for (int d = 0; d < avg_factor->ndim; ++d) count *= avg_factor->sizes[d];
  if (count != 1) fail("avg_factor must have one element, got " + std::to_string(count));
  const auto divide = [&](auto value) { return scale / (static_cast<double>(value) + kEps); };
  const void* const p = avg_factor->data;
  switch (avg_factor->dtype) {
    case GFL_FLOAT32:
      return divide(*static_cast<const float*>(p));
    case GFL_FLOAT64:
      return divide(*static_cast<const double*>(p));
    case GFL_BFLOAT16: {
      const uint32_t bits = uint32_t{*static_cast<const uint16_t*>(p)} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return divide(value);
    }
    case GFL_FLOAT16: {
      const int bits = *static_cast<const uint16_t*>(p), exponent = bits >> 10 & 0x1f,
                mantissa = bits & 0x3ff;
      const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                         : std::ldexp(mantissa, -24);
      return divide(bits & 0x8000 ? -size : size);
    }
    case GFL_INT64:
      return divide(*static_cast<const int64_t*>(p));
    case GFL_INT32:
      return divide(*static_cast<const int32_t*>(p));
    case GFL_INT16:
      return divide(*static_cast<const int16_t*>(p));
    case GFL_INT8:
      return divide(*static_cast<const int8_t*>(p));
    case GFL_UINT8:
      return divide(*static_cast<const uint8_t*>(p));
    case GFL_BOOL:
      return divide(*static_cast<const bool*>(p));
  }
  fail("avg_factor has an unknown dtype");
}

template <typename P>
int64_t most_rows(const P&, int64_t columns) {
  return std::max<int64_t>(1, kBlock / columns);
}
int64_t most_rows(const QualityProblem& q, int64_t columns) {
  return in_planes(q) ? kPlaneRows : std::max<int64_t>(1, kBlock / columns);
}

// Rows of a block: blocks of about the same size, at most `most` rows, that end where vectors and
// the kernels' groups of rows do.
int64_t rows_of_block(int64_t length, int64_t most) {
  constexpr int64_t unit = 64;
  if (most < unit || length == 0) return most;
  const int64_t blocks = (length + most - 1) / most, rows = (length + blocks - 1) / blocks;
  return (rows + unit - 1) / unit * unit;
}

// Runs kernel over all rows, block by block, and adds the blocks' sums in their order.
template <typename P, typename... Operands>
double run_blocks(double (*kernel)(const P&, int64_t, int64_t, void*), const P& problem,
                  int64_t columns, Operands P::*... operands) {
  const int inner = problem.ndim - 1;
  const int64_t length = problem.size[inner];
  int64_t outer = 1;
  for (int d = 0; d < inner; ++d) outer *= problem.size[d];
  const int64_t step = rows_of_block(length, most_rows(problem, columns));
  const int64_t per_run = (length + step - 1) / step, blocks = outer * per_run;
  if (blocks == 0) return 0;

  const auto body = [&](int64_t begin, int64_t end, double* sums) {
    void* const scratch = thread_scratch(scratch_bytes(problem));
    P moved = problem;
    for (int64_t b = begin; b < end; ++b) {
      int64_t rest = b / per_run;
      const auto move = [&](const Operand& from, Operand* to) {
        if (!from.data) return;
        int64_t offset = 0, index = rest;
        for (int d = inner - 1; d >= 0; --d) {
          offset += index % problem.size[d] * from.row[d];
          index /= problem.size[d];
        }
        to->data = from.data + offset * element_bytes(from.dtype);
      };
      if (inner > 0) (move(problem.*operands, &(moved.*operands)), ...);
      const int64_t first = b % per_run * step;
      sums[b] = kernel(moved, first, std::min(step, length - first), scratch);
    }
  };
  if (blocks == 1) {
    double sum;
    body(0, 1, &sum);
    return sum;
  }
  std::vector<double> sums(blocks);
  const int64_t grain =
      std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(step, length) * columns));
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, sums.data()); });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

double run_distribution(DistributionProblem d) {
  int64_t logits = d.bins;
  for (int dim = 0; dim < d.ndim; ++dim) logits *= d.size[dim];
  d.big_grad = d.grad.data && logits * element_bytes(d.grad.dtype) >= kStreamed;
  using D = DistributionProblem;
  return run_blocks(table().distribution, d, d.bins, &D::pred, &D::target, &D::weight_left,
                    &D::weight_right, &D::weight, &D::grad_loss, &D::loss, &D::saved, &D::grad);
}

// The bins' values, packed and in the type the kernels compute in; lives as long as they are read.
class BinValues {
 public:
  BinValues(const gfl_view* bins, int64_t count, bool wide) : doubles_(count), wide_(wide) {
    for (int64_t k = 0; k < count; ++k) {
      if (!bins) {
        doubles_[k] = static_cast<double>(k);
      } else {
        const int64_t at = k * bins->strides[0];
        doubles_[k] = wide ? static_cast<const double*>(bins->data)[at]
                           : static_cast<const float*>(bins->data)[at];
      }
    }
    if (!wide) floats_.assign(doubles_.begin(), doubles_.end());
  }
  char* data() {
    return wide_ ? reinterpret_cast<char*>(doubles_.data())
                 : reinterpret_cast<char*>(floats_.data());
  }

 private:
  std::vector<double> doubles_;
  std::vector<float> floats_;
  bool wide_;
};

// bins: their values, or null for 0, 1, 2, ...
void run_summary(DistributionProblem d, const gfl_view* bins) {
  BinValues values(bins, d.bins, d.pred.dtype == GFL_FLOAT64);
  d.values.data = values.data();
  run_distribution(d);
}

void write_scalar(const gfl_view* view, double value) {
  if (view->dtype == GFL_FLOAT64) {
    *static_cast<double*>(view->data) = value;
  } else {
    *static_cast<float*>(view->data) = static_cast<float>(value);
  }
}

}  // namespace

void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes + 64) {
    memory.reset(new char[bytes + 64]);
    size = bytes + 64;
  }
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
}

const KernelTable& table() {
  const KernelTable* const kernels_ = kernels();
  if (!kernels_) fail(last_error);
  return *kernels_;
}

double run_quality(const QualityProblem& q) {
  using Q = QualityProblem;
  return run_blocks(table().quality, q, q.classes, &Q::pred, &Q::target, &Q::score, &Q::weight,
                    &Q::grad_loss, &Q::loss, &Q::grad);
}

}  // namespace gfl

extern "C" int gfl_quality_cpu(const gfl_quality_args* args) {
  using namespace gfl;
  return guarded([&] {
    QualityProblem q = describe("gfl_quality_cpu", *args);
    q.scale = scale_of(args->scale, args->avg_factor);
    const double sum = run_quality(q);
    if (args->loss && args->loss->ndim == 0) write_scalar(args->loss, sum * q.scale);
  });
}

extern "C" int gfl_distribution_cpu(const gfl_distribution_args* args) {
  using namespace gfl;
  return guarded([&] {
    DistributionProblem d = describe("gfl_distribution_cpu", *args);
    d.scale = scale_of(args->scale, args->avg_factor);
    const double sum = run_distribution(d);
    if (args->loss && args->loss->ndim == 0) write_scalar(args->loss, sum * d.scale);
  });
}

extern "C" int gfl_integral_cpu(const gfl_integral_args* args) {
  return gfl::guarded(
      [&] { gfl::run_summary(gfl::describe("gfl_integral_cpu", *args), args->bins); });
}

extern "C" int gfl_statistics_cpu(const gfl_statistics_args* args) {
  return gfl::guarded(
      [&] { gfl::run_summary(gfl::describe("gfl_statistics_cpu", *args), nullptr); });
}

extern "C" int gfl_moments_cpu(const gfl_moments_args* args) {
  return gfl::guarded(
      [&] { gfl::run_summary(gfl::describe("gfl_moments_cpu", *args), args->bins); });
}

extern "C" int gfl_distillation_cpu(const gfl_distillation_args* args) {
  using namespace gfl;
  return guarded([&] {
    DistillationProblem d = describe("gfl_distillation_cpu", *args);
    d.scale = scale_of(args->scale, args->avg_factor);
    using D = DistillationProblem;
    const double sum = run_blocks(table().distillation, d, d.bins, &D::pred, &D::teacher,
                                  &D::weight, &D::grad_loss, &D::loss, &D::grad);
    if (args->loss && args->loss->ndim == 0) write_scalar(args->loss, sum * d.scale);
  });
}

extern "C" int gfl_decode_cpu(const gfl_decode_args* args) {
  using namespace gfl;
  return guarded([&] {
    DecodeProblem d = describe("gfl_decode_cpu", *args);
    BinValues values(args->bins, d.bins, d.pred.dtype == GFL_FLOAT64);
    d.values.data = values.data();
    using D = DecodeProblem;
    run_blocks(table().decode, d, 4 * d.bins + d.classes, &D::pred, &D::points, &D::strides,
               &D::cls, &D::limits, &D::boxes, &D::deviation, &D::score, &D::label);
  });
}

extern "C" const char* gfl_last_error(void) { return gfl::last_error.c_str(); }

extern "C" const char* gfl_version(void) { return GFL_VERSION; }

extern "C" const char* gfl_build_info(void) {
  static const std::string info =
      std::string("{\"version\": \"" GFL_VERSION "\", \"compiler\": \"" GFL_COMPILER
                  "\", \"built_against_torch\": \"" GFL_TORCH_VERSION
                  "\", \"sanitizers\": \"" GFL_SANITIZERS "\", \"isas\": \"baseline") +
#if defined(GFL_HAVE_AVX2)
      ",avx2" +
#endif
#if defined(GFL_HAVE_AVX512)
      ",avx512" +
#endif
      "\", \"cuda_architectures\": \"" GFL_CUDA_BUILT_FOR "\"}";
  return info.c_str();
}
