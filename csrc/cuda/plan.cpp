#include "plan.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>

#include "../error.h"

namespace gfl {
namespace {

// The kernels for common layouts compute in 32 bits where a row is.
constexpr int64_t kSmall = 1 << 30;
// Of shared memory, by which tiles of rows are cut: a dozen of them fit into a multiprocessor.
constexpr int64_t kTileBytes = 18 * 1024, kSharedBytes = 48 * 1024;
constexpr int64_t kStaticBytes = 6 * 1024;  // of it, or more than distribution_kernel declares

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int vector_size(gfl_dtype dtype) { return static_cast<int>(16 / element_bytes(dtype)); }

bool aligned(const Operand& operand) { return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0; }

Steps steps_of(const Operand& operand, int ndim) {
  Steps steps{};
  for (int d = 0; d < ndim; ++d) steps.row[kMaxDims - ndim + d] = operand.row[d];
  steps.column = operand.column;
  steps.dtype = operand.dtype;
  steps.present = operand.data != nullptr;
  return steps;
}

RowShape rows_of(int ndim, const int64_t* size) {
  RowShape rows{};
  rows.ndim = ndim;
  rows.count = 1;
  std::fill_n(rows.size, kMaxDims, 1);
  for (int d = 0; d < ndim; ++d) {
    rows.size[kMaxDims - ndim + d] = size[d];
    rows.count *= size[d];
  }
  return rows;
}

// Whether a row is found in 32 bits: at most three dimensions, and their numbers and strides small.
bool simple(const RowShape& rows, std::initializer_list<const Steps*> operands) {
  if (rows.ndim > 3 || rows.count > kSmall) return false;
  for (const Steps* steps : operands) {
    for (int d = kMaxDims - rows.ndim; d < kMaxDims; ++d) {
      if (std::abs(steps->row[d]) > kSmall) return false;
    }
    if (std::abs(steps->column) > kSmall) return false;
  }
  return true;
}

// Whether every row is aligned whose classes are neighbours.
bool classes_aligned(const Operand& operand, const Steps& steps, int64_t vector) {
  return aligned(operand) && steps.row[kInner] % vector == 0 &&
         steps.row[kInner - 1] % vector == 0 && steps.row[kInner - 2] % vector == 0;
}

// Whether `vector` neighbouring rows are aligned wherever they begin at a multiple of it.
bool rows_aligned(const Operand& operand, const Steps& steps, int64_t vector) {
  return aligned(operand) && steps.column % vector == 0 && steps.row[kInner - 1] % vector == 0 &&
         steps.row[kInner - 2] % vector == 0;
}

// For the most threads to a row of n equal parts, a power of two up to 32, that leave at most a
// tenth of themselves idle beyond what fewer threads would: its logarithm.
int lane_bits_for(int64_t n, int most = 5) {
  int64_t least = std::numeric_limits<int64_t>::max();
  int best = 0;
  for (int bits = 0; bits <= most; ++bits) {
    const int64_t padded = ceil_div(n, 1 << bits) << bits;
    least = std::min(least, padded);
    if (padded * 10 <= least * 11) best = bits;
  }
  return best;
}

Scale scale_of(const char* name, double scale, const gfl_view* avg_factor) {
  if (!avg_factor) return {scale, GFL_FLOAT32};
  int64_t count = 1;
  for (int d = 0; d < avg_factor->ndim; ++d) count *= avg_factor->sizes[d];
  if (count != 1) {
    fail(std::string(name) + ": avg_factor must have one element, got " + std::to_string(count));
  }
  return {scale, avg_factor->dtype};
}

template <typename T>
void add_argument(Launch* launch, const T& value) {
  Launch::Argument& argument = launch->arguments[launch->count];
  argument = {0, sizeof(T), std::is_pointer_v<T>};
  if (launch->count > 0) {
    const Launch::Argument& last = launch->arguments[launch->count - 1];
    argument.offset = (last.offset + last.size + 7) / 8 * 8;
  }
  static_assert(sizeof(T) + 16 * 8 <= sizeof launch->bytes);
  std::memcpy(launch->bytes + argument.offset, &value, sizeof value);
  ++launch->count;
}

void set_kernel(Launch* launch, KernelFamily family, int dtype, int variant = -1) {
  static const char* const names[] = {"quality_kernel", "quality_general_kernel",
                                      "distribution_kernel", "distribution_general_kernel",
                                      "finish_kernel"};
  launch->family = family;
  launch->dtype = dtype;
  launch->variant = variant;
  if (variant < 0) {
    std::snprintf(launch->name, sizeof launch->name, "%s<%d>", names[family], dtype);
  } else {
    std::snprintf(launch->name, sizeof launch->name, "%s<%d, %d>", names[family], dtype, variant);
  }
}

void set_grid(Launch* launch, int64_t blocks, int block) {
  launch->grid = static_cast<int32_t>(std::clamp<int64_t>(blocks, 1, kMaxBlocks));
  launch->block = block;
}

const void* data_of(const gfl_view* view) { return view ? view->data : nullptr; }

void check_workspace(const char* name, const double* workspace) {
  if (!workspace) fail(std::string(name) + ": a loss that is a sum needs a workspace");
}

// The launch that adds up what the blocks of the first have left.
void add_finish(Plan* plan, const double* partials, const gfl_view* loss,
                const gfl_view* avg_factor, const Scale& scale) {
  Launch* const launch = &plan->launches[plan->count++];
  set_kernel(launch, kFinishKernel, loss->dtype);
  launch->grid = 1;
  launch->block = kFinishThreads;
  add_argument(launch, partials);
  add_argument(launch, plan->launches[0].grid);
  add_argument(launch, data_of(avg_factor));
  add_argument(launch, loss->data);
  add_argument(launch, scale);
}

bool is_sum(const gfl_view* loss) { return loss && loss->ndim == 0; }

// How a matrix lies, if quality_kernel knows it: 0 for rows, kPlanes, or -1.
int quality_layout(const Operand& operand, const Steps& steps, int64_t classes) {
  if (steps.row[kInner] == 1 && (classes == 1 || operand.column != 1)) return kPlanes;
  return operand.column == 1 ? 0 : -1;
}

void plan_quality(const QualityProblem& q, bool sum, QualityShape* s, Launch* launch) {
  const bool dense = !q.score.data, has_loss = sum || q.loss.data;
  const int64_t vector = vector_size(q.pred.dtype);
  const int layout = quality_layout(q.pred, s->pred, q.classes);
  const bool same = !q.grad.data || quality_layout(q.grad, s->grad, q.classes) == layout;
  const bool target_fits =
      !dense || (quality_layout(q.target, s->target, q.classes) == layout &&
                 (q.target.dtype == q.pred.dtype || q.target.dtype == GFL_FLOAT32));
  if (layout < 0 || !same || !target_fits || q.pred.dtype == GFL_FLOAT64 ||
      (q.probabilities && has_loss && q.grad.data) || q.beta != 2 || q.weight_per_class ||
      q.classes > kSmall / 4 ||
      !simple(s->rows,
              {&s->pred, &s->target, &s->score, &s->weight, &s->upstream, &s->loss, &s->grad})) {
    set_kernel(launch, kQualityGeneralKernel, q.pred.dtype);
    s->lane_bits = q.pred.column == 1 ? lane_bits_for(q.classes) : 0;
    set_grid(launch, ceil_div(s->rows.count, kQualityThreads >> s->lane_bits), kQualityThreads);
    return;
  }
  const int variant = (has_loss ? kLoss : 0) | (q.grad.data ? kGrad : 0) | (dense ? kDense : 0) |
                      layout | (q.probabilities ? kProbabilities : 0);
  set_kernel(launch, kQualityKernel, q.pred.dtype, variant);
  s->target_is_float = q.target.dtype == GFL_FLOAT32 && q.pred.dtype != GFL_FLOAT32;
  if (layout == kPlanes) {
    if (q.classes == 1) s->pred.column = s->grad.column = s->target.column = 0;
    s->wide = rows_aligned(q.pred, s->pred, vector) &&
              (!q.grad.data || rows_aligned(q.grad, s->grad, vector)) &&
              (!dense || rows_aligned(q.target, s->target, vector));
    s->tiles_per_run = ceil_div(s->rows.size[kInner], 32 * vector);
    s->tiles = s->rows.count / s->rows.size[kInner] * s->tiles_per_run;
    s->part_bits = lane_bits_for(q.classes, 3);
    const int64_t groups = kQualityThreads / 32 >> s->part_bits;
    launch->shared_bytes = static_cast<int32_t>(groups * 32 * vector * kPlaneRowFloats * 4);
    set_grid(launch, ceil_div(s->tiles, groups), kQualityThreads);
  } else {
    s->wide = q.classes % vector == 0 && classes_aligned(q.pred, s->pred, vector) &&
              (!q.grad.data || classes_aligned(q.grad, s->grad, vector)) &&
              (!dense || classes_aligned(q.target, s->target, vector));
    s->lane_bits = lane_bits_for(ceil_div(q.classes, vector));
    set_grid(launch, ceil_div(s->rows.count, kQualityThreads >> s->lane_bits), kQualityThreads);
  }
}

// n / d = n * magic >> 32 for n < 2^16 and 2 <= d < 2^16.
uint32_t magic_of(int64_t d) {
  return static_cast<uint32_t>(((int64_t{1} << 32) - 1) / std::max<int64_t>(2, d) + 1);
}

// mode -1: not one that distribution_kernel knows. Needs all but the stages themselves in s.
StageShape stage_of(const Operand& operand, const Steps& steps, const DistributionShape& s,
                    int64_t vector) {
  StageShape stage{};
  int64_t length;
  if (operand.column == 1) {
    const bool gapless = s.rows.ndim == 1 && steps.row[kInner] == s.bins && s.bin_step == 1;
    const bool vectors = aligned(operand) && s.tile_rows * s.bins % vector == 0;
    // Rows with pads between them in shared memory move as one line only in whole vectors, of which
    // none is left out.
    const bool packed = gapless && (s.row_step == s.bins || (vectors && !s.weight.present));
    stage.mode = packed ? kPacked : kRows;
    stage.wide = packed ? vectors : s.whole_vectors && classes_aligned(operand, steps, vector);
    length = s.bins;
  } else {
    stage.mode = steps.row[kInner] == 1 ? kBinPlanes : -1;
    stage.wide = s.row_step == 1 && s.tile_rows % vector == 0 && s.bin_step % vector == 0 &&
                 rows_aligned(operand, steps, vector);
    length = s.tile_rows;
  }
  stage.slots = static_cast<int32_t>(ceil_div(stage.wide ? length : length + vector - 1, vector));
  stage.slots_magic = magic_of(stage.slots);
  return stage;
}

void plan_distribution(const DistributionProblem& d, DistributionShape* s, Launch* launch) {
  const int64_t bytes = element_bytes(d.pred.dtype), vector = vector_size(d.pred.dtype);
  // Of rows in shared memory: an odd number of vectors, or they begin anywhere. No bank conflicts
  // where threads walk along them, or two to a bank where the number of words is even.
  const int64_t row_step = d.bins % vector == 0 ? (d.bins / vector | 1) * vector : d.bins;
  const bool planes = d.pred.column != 1;
  int64_t tile_rows = kMostTileRows;
  while (tile_rows > kDistributionThreads / 32 &&
         (tile_rows * row_step * bytes > kTileBytes ||
          (s->rows.ndim > 1 && tile_rows >= 2 * s->rows.size[kInner]))) {
    tile_rows /= 2;
  }
  s->tile_rows = static_cast<int32_t>(tile_rows);
  s->lane_bits = std::max(0, std::countr_zero(uint32_t{kDistributionThreads}) -
                                 std::countr_zero(static_cast<uint32_t>(tile_rows)));
  // Lanes of a row are a plane apart: in other banks.
  const int64_t pad = s->lane_bits ? std::max<int64_t>(1, (128 >> s->lane_bits) / bytes) : 0;
  s->row_step = planes ? 1 : static_cast<int32_t>(row_step);
  s->bin_step = planes ? static_cast<int32_t>(tile_rows + pad) : 1;
  s->whole_vectors = !planes && d.bins % vector == 0;
  const int64_t shared = bytes * (planes ? d.bins * s->bin_step : tile_rows * row_step);
  s->pred_stage = stage_of(d.pred, s->pred, *s, vector);
  s->grad_stage = d.grad.data ? stage_of(d.grad, s->grad, *s, vector) : s->pred_stage;
  if (s->pred_stage.mode < 0 || s->grad_stage.mode < 0 || d.bins < 2 ||
      !simple(s->rows, {&s->pred, &s->target, &s->weight_left, &s->weight_right, &s->weight,
                        &s->upstream, &s->loss, &s->grad}) ||
      shared > kSharedBytes - kStaticBytes) {
    set_kernel(launch, kDistributionGeneralKernel, d.pred.dtype);
    s->lane_bits = d.pred.column == 1 ? lane_bits_for(d.bins) : 0;
    set_grid(launch, ceil_div(s->rows.count, kDistributionThreads >> s->lane_bits),
             kDistributionThreads);
    return;
  }
  const bool whole = (d.bins == 8 || d.bins == 16 || d.bins == 17 || d.bins == 33) &&
                     s->lane_bits == 0 && d.pred.dtype != GFL_FLOAT64;
  set_kernel(launch, kDistributionKernel, d.pred.dtype, whole ? static_cast<int>(d.bins) : 0);
  s->tiles_per_run = ceil_div(s->rows.size[kInner], tile_rows);
  s->tiles = s->rows.count / s->rows.size[kInner] * s->tiles_per_run;
  s->bins_magic = magic_of(d.bins);
  launch->shared_bytes = static_cast<int32_t>(shared);
  set_grid(launch, s->tiles, kDistributionThreads);
}

void add_distribution(const DistributionProblem& d, const Scale& scale, const void* avg_factor,
                      double* partials, Plan* plan) {
  DistributionShape s{};
  s.rows = rows_of(d.ndim, d.size);
  s.bins = d.bins;
  s.scale = scale;
  s.pred = steps_of(d.pred, d.ndim);
  s.target = steps_of(d.target, d.ndim);
  s.weight_left = steps_of(d.weight_left, d.ndim);
  s.weight_right = steps_of(d.weight_right, d.ndim);
  s.weight = steps_of(d.weight, d.ndim);
  s.upstream = steps_of(d.grad_loss, d.ndim);
  s.values = steps_of(d.values, 0);
  s.loss = steps_of(d.loss, d.ndim);
  s.grad = steps_of(d.grad, d.ndim);
  Launch* const launch = &plan->launches[plan->count++];
  plan_distribution(d, &s, launch);
  for (const Operand* operand :
       {&d.pred, &d.target, &d.weight_left, &d.weight_right, &d.weight, &d.grad_loss}) {
    add_argument(launch, static_cast<const void*>(operand->data));
  }
  add_argument(launch, avg_factor);
  add_argument(launch, static_cast<const void*>(d.values.data));
  add_argument(launch, static_cast<void*>(d.loss.data));
  add_argument(launch, partials);
  add_argument(launch, static_cast<void*>(d.grad.data));
  add_argument(launch, s);
}

}  // namespace

void plan(const char* name, const gfl_quality_args& args, double* workspace, Plan* plan) {
  *plan = {};
  const QualityProblem q = describe(name, args);
  const bool sum = is_sum(args.loss);
  const Scale scale = scale_of(name, args.scale, args.avg_factor);
  if (sum) check_workspace(name, workspace);
  QualityShape s{};
  s.rows = rows_of(q.ndim, q.size);
  if (s.rows.count == 0 || (!args.loss && !args.grad)) return;
  s.classes = q.classes;
  s.scale = scale;
  s.beta = q.beta;
  s.probabilities = q.probabilities;
  s.weight_per_class = q.weight_per_class;
  s.pred = steps_of(q.pred, q.ndim);
  s.target = steps_of(q.target, q.ndim);
  s.score = steps_of(q.score, q.ndim);
  s.weight = steps_of(q.weight, q.ndim);
  s.upstream = steps_of(q.grad_loss, q.ndim);
  s.loss = steps_of(q.loss, q.ndim);
  s.grad = steps_of(q.grad, q.ndim);
  Launch* const launch = &plan->launches[plan->count++];
  plan_quality(q, sum, &s, launch);
  for (const Operand* operand : {&q.pred, &q.target, &q.score, &q.weight, &q.grad_loss}) {
    add_argument(launch, static_cast<const void*>(operand->data));
  }
  add_argument(launch, data_of(args.avg_factor));
  add_argument(launch, static_cast<void*>(q.loss.data));
  add_argument(launch, sum ? workspace : nullptr);
  add_argument(launch, static_cast<void*>(q.grad.data));
  add_argument(launch, s);
  if (sum) add_finish(plan, workspace, args.loss, args.avg_factor, scale);
}

void plan(const char* name, const gfl_distribution_args& args, double* workspace, Plan* plan) {
  *plan = {};
  const DistributionProblem d = describe(name, args);
  const bool sum = is_sum(args.loss);
  const Scale scale = scale_of(name, args.scale, args.avg_factor);
  if (sum) check_workspace(name, workspace);
  if (rows_of(d.ndim, d.size).count == 0 || (!args.loss && !args.grad)) return;
  add_distribution(d, scale, data_of(args.avg_factor), sum ? workspace : nullptr, plan);
  if (sum) add_finish(plan, workspace, args.loss, args.avg_factor, scale);
}

void plan(const char* name, const gfl_integral_args& args, Plan* plan) {
  *plan = {};
  DistributionProblem d = describe(name, args);
  if (rows_of(d.ndim, d.size).count == 0 || (!args.out && !args.grad)) return;
  if (args.bins) {
    d.values.data = static_cast<char*>(args.bins->data);
    d.values.column = args.bins->strides[0];
  }
  add_distribution(d, {1, GFL_FLOAT32}, nullptr, nullptr, plan);
}

}  // namespace gfl

// For the tests, which run the plans where there is no GPU.
extern "C" {

GFL_API int gfl_quality_cuda_plan(const gfl_quality_args* args, double* workspace,
                                  gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_quality_cuda", *args, workspace, plan); });
}
GFL_API int gfl_distribution_cuda_plan(const gfl_distribution_args* args, double* workspace,
                                       gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_distribution_cuda", *args, workspace, plan); });
}
GFL_API int gfl_integral_cuda_plan(const gfl_integral_args* args, gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_integral_cuda", *args, plan); });
}
GFL_API int64_t gfl_cuda_plan_bytes(void) { return sizeof(gfl::Plan); }
}
