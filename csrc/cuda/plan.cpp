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

// For the most threads to a row of n equal parts, a power of two up to 32, that leave at most one
// in `one_in` of themselves idle beyond what fewer threads would: its logarithm.
int lane_bits_for(int64_t n, int most = 5, int one_in = 10) {
  int64_t least = std::numeric_limits<int64_t>::max();
  int best = 0;
  for (int bits = 0; bits <= most; ++bits) {
    const int64_t padded = ceil_div(n, 1 << bits) << bits;
    least = std::min(least, padded);
    if (padded * one_in <= least * (one_in + 1)) best = bits;
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
  static const char* const names[] = {"quality_kernel",
                                      "quality_general_kernel",
                                      "distribution_kernel",
                                      "distribution_general_kernel",
                                      "finish_kernel",
                                      "head_boxes_kernel",
                                      "head_boxes_finish_kernel",
                                      "head_class_kernel",
                                      "head_class_general_kernel",
                                      "head_losses_kernel",
                                      "head_box_grad_kernel",
                                      "distillation_kernel",
                                      "decode_kernel",
                                      "score_kernel"};
  dtype = kernel_dtype(dtype);
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

// What quality_kernel takes a loss for: 0, kProbabilities, kFamily, or -1 if it does not know it.
int quality_kind(const QualityProblem& q) {
  switch (q.form) {
    case GFL_LOGITS:  // with beta = 0 it is binary cross entropy
      return q.beta == 2 ? 0 : q.beta == 0 ? kFamily : -1;
    case GFL_PROBABILITIES:
      return q.beta == 2 ? kProbabilities : -1;
    case GFL_BALANCED:
      return q.beta == 2 ? kFamily : -1;
    default:
      return on_probabilities(q.form) ? -1 : kFamily;
  }
}

void plan_quality(const QualityProblem& q, bool sum, QualityShape* s, Launch* launch) {
  const bool dense = !q.score.data, has_loss = sum || q.loss.data;
  const int64_t vector = vector_size(q.pred.dtype);
  const int layout = quality_layout(q.pred, s->pred, q.classes);
  const bool same = !q.grad.data || quality_layout(q.grad, s->grad, q.classes) == layout;
  const bool target_fits =
      !dense || (quality_layout(q.target, s->target, q.classes) == layout &&
                 (q.target.dtype == q.pred.dtype || q.target.dtype == GFL_FLOAT32));
  const int kind = quality_kind(q);
  if (layout < 0 || !same || !target_fits || q.pred.dtype == GFL_FLOAT64 || kind < 0 ||
      (kind != 0 && has_loss && q.grad.data) || q.weight_per_class || q.classes > kSmall / 4 ||
      !simple(s->rows,
              {&s->pred, &s->target, &s->score, &s->weight, &s->upstream, &s->loss, &s->grad})) {
    set_kernel(launch, kQualityGeneralKernel, q.pred.dtype);
    s->lane_bits = q.pred.column == 1 ? lane_bits_for(q.classes) : 0;
    set_grid(launch, ceil_div(s->rows.count, kQualityThreads >> s->lane_bits), kQualityThreads);
    return;
  }
  const int variant =
      (has_loss ? kLoss : 0) | (q.grad.data ? kGrad : 0) | (dense ? kDense : 0) | layout | kind;
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
    s->lane_bits = lane_bits_for(ceil_div(q.classes, vector), 5, 20);
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
  // The gradient of statistics has a tile of its own.
  const int64_t copies = d.kind == kStatistics && d.grad.data ? 2 : 1;
  int64_t tile_rows = kMostTileRows;
  while (tile_rows > kDistributionThreads / 32 &&
         (copies * tile_rows * row_step * bytes > kTileBytes ||
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
  const int64_t tile = planes ? d.bins * s->bin_step : tile_rows * row_step;
  s->grad_offset = copies > 1 ? static_cast<int32_t>(ceil_div(tile, vector) * vector) : 0;
  const int64_t shared = bytes * (s->grad_offset + tile);
  s->pred_stage = stage_of(d.pred, s->pred, *s, vector);
  s->grad_stage = d.grad.data ? stage_of(d.grad, s->grad, *s, vector) : s->pred_stage;
  if (s->pred_stage.mode < 0 || s->grad_stage.mode < 0 || d.bins < 2 ||
      d.pred.dtype == GFL_FLOAT64 ||
      !simple(s->rows, {&s->pred, &s->target, &s->weight_left, &s->weight_right, &s->weight,
                        &s->upstream, &s->loss, &s->grad}) ||
      shared > kSharedBytes - kStaticBytes) {
    set_kernel(launch, kDistributionGeneralKernel, d.pred.dtype);
    s->lane_bits = d.pred.column == 1 ? lane_bits_for(d.bins) : 0;
    set_grid(launch, ceil_div(s->rows.count, kDistributionThreads >> s->lane_bits),
             kDistributionThreads);
    return;
  }
  const bool whole =
      (d.bins == 8 || d.bins == 16 || d.bins == 17 || d.bins == 33) && s->lane_bits == 0;
  set_kernel(launch, kDistributionKernel, d.pred.dtype,
             s->summary ? kSummary
             : whole    ? static_cast<int>(d.bins)
                        : 0);
  s->tiles_per_run = ceil_div(s->rows.size[kInner], tile_rows);
  s->tiles = s->rows.count / s->rows.size[kInner] * s->tiles_per_run;
  s->bins_magic = magic_of(d.bins);
  launch->shared_bytes = static_cast<int32_t>(shared);
  set_grid(launch, s->tiles, kDistributionThreads);
}

void add_distribution(const DistributionProblem& d, const Scale& scale, const void* avg_factor,
                      double* partials, Plan* plan) {
  DistributionShape s{};
  s.kind = d.kind;
  s.window = d.window;
  s.topk = d.topk;
  s.add_mean = d.add_mean;
  s.summary = d.kind >= kStatistics || (d.kind == kExpectation && d.window >= 0);
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

// Heads

// The levels of a call, as its launches need them.
class Head {
 public:
  Head(const char* name, const gfl_head_args& args) : name_(name), args_(args) {
    if (args.levels < 1 || args.levels > kMaxHeadLevels) {
      fail(name_ + ": at most " + std::to_string(kMaxHeadLevels) + " levels, got " +
           std::to_string(args.levels));
    }
    if (!args.sums || !args.normalisers) fail(name_ + ": arguments are missing");
    for (int l = 0; l < args.levels; ++l) {
      const HeadProblem& h = levels_[l] = describe(name, args, l, shape_.anchors);
      const HeadProblem& first = levels_[0];
      if (h.batch != first.batch || h.classes != first.classes || h.bins != first.bins) {
        fail(name_ + ": all levels must have as many images, classes and bins");
      }
      for (const auto operand :
           {&HeadProblem::cls, &HeadProblem::scores, &HeadProblem::box, &HeadProblem::points,
            &HeadProblem::labels, &HeadProblem::box_targets, &HeadProblem::label_weights}) {
        if ((h.*operand).dtype != (first.*operand).dtype) {
          fail(name_ + ": a list must have one dtype in all levels");
        }
      }
      if (h.classes < 1 || h.classes > kSmall || h.bins > kSmall >> 10 || h.cells > kSmall ||
          h.batch > kSmall) {
        fail(name_ + ": too large, or no classes");
      }
      shape_.anchors += h.cells;
    }
    const HeadProblem& first = levels_[0];
    shape_.iou_eps = args.iou_eps;
    shape_.limit = args.limit;
    shape_.varifocal = args.form == GFL_VARIFOCAL;
    shape_.alpha = args.alpha;
    shape_.beta = args.beta;
    std::copy_n(args.loss_weights, 3, shape_.loss_weights);
    shape_.normaliser_step = args.normalisers->strides[0];
    shape_.sums_row = args.sums->strides[0];
    shape_.sums_column = args.sums->strides[1];
    shape_.count = args.levels;
    shape_.batch = static_cast<int32_t>(first.batch);
    shape_.classes = static_cast<int32_t>(first.classes);
    shape_.bins = static_cast<int32_t>(first.bins);
    shape_.label_dtype = first.labels.dtype;
    shape_.label_weight_dtype = first.label_weights.dtype;
    shape_.point_dtype = first.points.dtype;
    shape_.box_target_dtype = first.box_targets.dtype;
    shape_.iou = args.iou;
    shape_.dense = first.dense;
    accumulator_ = accumulator(first.cls.dtype);
    for (int i = 0; i < 6; ++i) {
      const gfl_view* const loss = args.losses[i] ? args.losses[i] : args.grad_losses[i];
      if (!loss) continue;
      const bool each = i >= 3;
      if (loss->dtype != accumulator_ || loss->ndim != each ||
          (each && loss->sizes[0] != args.levels)) {
        fail(name_ + ": a loss or an upstream gradient has the wrong dtype or shape");
      }
      if (each) shape_.level_steps[i - 3] = loss->strides[0];
    }
    shape_.unit_upstream = args.losses[0] != nullptr;
  }

  // In doubles: four for each tile of boxes, or one for each tile of classes.
  int64_t workspace() const {
    HeadShape s = shape_;
    const int64_t of_boxes = 4 * set_tiles(&s, kBoxThreads);
    set_classes(&s, false);
    return std::max<int64_t>({1, of_boxes, s.tiles});
  }

  void add_boxes(Plan* plan, double* partials) {
    HeadShape s = shape_;
    s.logits_dtype = levels_[0].box.dtype;
    s.target_dtype = levels_[0].scores.dtype;
    for (int l = 0; l < s.count; ++l) {
      const HeadProblem& h = levels_[l];
      set_level(h, h.box, h.scores, {}, &s.levels[l]);
    }
    set_tiles(&s, kBoxThreads);
    if (s.tiles > 0) {
      Launch* const launch = add(plan, kHeadBoxesKernel, accumulator_, s, kBoxThreads);
      add_arguments(launch,
                    {args_.quality->data, args_.weight->data, data_of(args_.boxes), partials});
      add_argument(launch, s);
    }
    Launch* const finish = add(plan, kHeadBoxesFinishKernel, accumulator_, s, kHeadFinishThreads);
    finish->grid = 1;
    add_arguments(finish, {partials, args_.sums->data, args_.normalisers->data});
    add_argument(finish, s);
  }

  // The loss of classes, or its gradient.
  void add_classes(Plan* plan, double* partials, bool has_grad) {
    HeadShape s = shape_;
    const KernelFamily family = set_classes(&s, has_grad);
    if (s.tiles > 0) {
      const gfl_dtype dtype = levels_[0].cls.dtype;
      int variant = -1;
      if (family == kHeadClassKernel) {
        variant = (has_grad ? kGrad : kLoss) | (s.planes ? kPlanes : 0) | (s.dense ? kDense : 0) |
                  (s.varifocal ? kVarifocal
                   : s.dense   ? kCrossEntropy
                               : 0);
      }
      Launch* const launch = add(plan, family, dtype, s, kClassThreads, variant);
      launch->shared_bytes = static_cast<int32_t>(
          s.tile_cells * (2 * element_bytes(accumulator_) + static_cast<int64_t>(sizeof(int32_t))));
      add_arguments(launch,
                    {args_.quality->data, args_.normalisers->data, data_of(args_.grad_losses[0]),
                     data_of(args_.grad_losses[3]), has_grad ? nullptr : partials});
      add_argument(launch, s);
    }
    if (has_grad) return;
    Launch* const finish = add(plan, kHeadLossesKernel, accumulator_, s, kHeadFinishThreads);
    finish->grid = 1;
    add_arguments(finish, {partials, args_.sums->data, args_.normalisers->data});
    for (const gfl_view* loss : args_.losses) add_arguments(finish, {loss->data});
    add_argument(finish, s);
  }

  void add_box_grad(Plan* plan) {
    HeadShape s = shape_;
    s.logits_dtype = levels_[0].box.dtype;
    s.logits_bytes = static_cast<int32_t>(element_bytes(levels_[0].box.dtype));
    const int64_t vector = vector_size(levels_[0].box.dtype);
    for (int l = 0; l < s.count; ++l) {
      const HeadProblem& h = levels_[l];
      HeadLevel& level = s.levels[l];
      set_level(h, h.box, {}, h.grad, &level);
      level.wide = planes_aligned(level, level.grad, vector, h.batch);
      level.packed =
          level.grad.column == 1 && level.grad.cell == 4 * h.bins && level.width == level.cells;
    }
    set_tiles(&s, kBoxThreads);
    if (s.tiles == 0) return;
    Launch* const launch = add(plan, kHeadBoxGradKernel, accumulator_, s, kBoxThreads);
    add_arguments(launch, {args_.weight->data, args_.normalisers->data,
                           data_of(args_.grad_losses[1]), data_of(args_.grad_losses[2]),
                           data_of(args_.grad_losses[4]), data_of(args_.grad_losses[5])});
    add_argument(launch, s);
  }

 private:
  static HeadMatrix matrix_of(const HeadProblem& h, const Operand& o) {
    // Where a row is one cell, the next row is the next cell.
    return {o.data, o.row[0], o.row[1], h.width == 1 && h.cells > 1 ? o.row[1] : o.row[2],
            o.column};
  }
  static HeadVector vector_of(const Operand& o) { return {o.data, o.row[0], o.row[1], o.column}; }
  static bool has_gaps(const HeadProblem& h, const HeadMatrix& matrix) {
    return matrix.data && h.width < h.cells && matrix.row != h.width * matrix.cell;
  }

  static void set_level(const HeadProblem& h, const Operand& logits, const Operand& targets,
                        const Operand& grad, HeadLevel* level) {
    level->logits = matrix_of(h, logits);
    level->targets = matrix_of(h, targets);
    level->grad = matrix_of(h, grad);
    level->points = vector_of(h.points);
    level->labels = vector_of(h.labels);
    level->box_targets = vector_of(h.box_targets);
    level->label_weights = vector_of(h.label_weights);
    level->stride = h.stride;
    level->cells = static_cast<int32_t>(h.cells);
    const bool gaps =
        has_gaps(h, level->logits) || has_gaps(h, level->targets) || has_gaps(h, level->grad);
    level->width = static_cast<int32_t>(gaps ? h.width : h.cells);
  }

  // Cuts the levels into tiles; returns how many.
  int64_t set_tiles(HeadShape* s, int64_t tile_cells) const {
    int64_t tiles = 0, anchor = 0;
    s->tile_cells = static_cast<int32_t>(tile_cells);
    for (int l = 0; l < s->count; ++l) {
      HeadLevel& level = s->levels[l];
      level.anchor = anchor;
      level.first_tile = static_cast<int32_t>(tiles);
      level.tiles = static_cast<int32_t>(ceil_div(levels_[l].cells, tile_cells));
      tiles += s->batch * level.tiles;
      if (tiles > kSmall) fail(name_ + ": too many anchors");
      anchor += levels_[l].cells;
    }
    s->tiles = static_cast<int32_t>(tiles);
    return tiles;
  }

  // Whether `vector` neighbouring cells are aligned wherever they begin at a multiple of it.
  static bool planes_aligned(const HeadLevel& level, const HeadMatrix& m, int64_t vector,
                             int64_t batch) {
    return m.cell == 1 && level.width == level.cells && level.cells % vector == 0 &&
           reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.column % vector == 0 &&
           (batch == 1 || m.image % vector == 0);
  }
  // Whether every cell is aligned whose columns are neighbours.
  static bool columns_aligned(const HeadLevel& level, const HeadMatrix& m, int64_t vector,
                              int64_t batch) {
    return m.column == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.cell % vector == 0 &&
           (level.width == level.cells || m.row % vector == 0) &&
           (batch == 1 || m.image % vector == 0);
  }

  KernelFamily set_classes(HeadShape* s, bool has_grad) const {
    const gfl_dtype dtype = levels_[0].cls.dtype, target_dtype = levels_[0].scores.dtype;
    const int64_t vector = vector_size(dtype);
    const int64_t target_vector = vector_size(s->dense ? target_dtype : dtype);
    const HeadProblem* largest = &levels_[0];
    for (int l = 0; l < s->count; ++l) {
      const HeadProblem& h = levels_[l];
      set_level(h, h.cls, s->dense ? h.scores : Operand{}, has_grad ? h.grad_cls : Operand{},
                &s->levels[l]);
      if (h.cells > largest->cells) largest = &h;
    }
    s->logits_dtype = dtype;
    s->target_dtype = target_dtype;
    s->target_is_float = target_dtype == GFL_FLOAT32 && dtype != GFL_FLOAT32;
    s->has_grad = has_grad;
    s->planes = matrix_of(*largest, largest->cls).cell == 1 &&
                (s->classes == 1 || largest->cls.column != 1);
    for (int l = 0; l < s->count; ++l) {
      HeadLevel& level = s->levels[l];
      const auto fits = [&](const HeadMatrix& m, int64_t n) {
        return s->planes ? planes_aligned(level, m, n, s->batch)
                         : columns_aligned(level, m, n, s->batch);
      };
      level.wide = (s->planes || s->classes % vector == 0) && fits(level.logits, vector) &&
                   (!has_grad || fits(level.grad, vector));
      level.columns = level.logits.column == 1 && (!has_grad || level.grad.column == 1);
      level.target_wide = level.wide && s->dense && fits(level.targets, target_vector);
    }
    const bool common = dtype != GFL_FLOAT64 && s->beta == (s->dense && !s->varifocal ? 0 : 2) &&
                        (!s->dense || target_dtype == dtype || target_dtype == GFL_FLOAT32);
    s->lane_bits = lane_bits_for(ceil_div(s->classes, vector));
    s->element_lane_bits = lane_bits_for(s->classes);
    s->part_bits = lane_bits_for(s->classes, 3);
    const int64_t warps = kClassThreads / 32 >> s->part_bits;
    set_tiles(s, s->planes ? warps * 32 * (common ? vector : 4)
                           : std::max(128, kClassThreads >> s->lane_bits));
    return common ? kHeadClassKernel : kHeadClassGeneralKernel;
  }

  static Launch* add(Plan* plan, KernelFamily family, int dtype, const HeadShape& s, int block,
                     int variant = -1) {
    Launch* const launch = &plan->launches[plan->count++];
    set_kernel(launch, family, dtype, variant);
    launch->grid = s.tiles;
    launch->block = block;
    return launch;
  }
  static void add_arguments(Launch* launch, std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) add_argument(launch, pointer);
  }

  std::string name_;
  const gfl_head_args& args_;
  HeadProblem levels_[kMaxHeadLevels];
  HeadShape shape_{};
  gfl_dtype accumulator_;
};

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
  s.alpha = q.alpha;
  s.beta = q.beta;
  s.form = q.form;
  s.flags = q.flags;
  s.background_alpha = static_cast<float>(background_alpha(q.form, q.alpha));
  s.gamma = static_cast<float>(q.beta);
  s.detach = detaches_weight(q.form, q.flags);
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

static void plan_summary(DistributionProblem d, const gfl_view* bins, Plan* plan) {
  *plan = {};
  if (rows_of(d.ndim, d.size).count == 0 || (!d.loss.data && !d.grad.data)) return;
  if (bins) {
    d.values.data = static_cast<char*>(bins->data);
    d.values.column = bins->strides[0];
  }
  add_distribution(d, {1, GFL_FLOAT32}, nullptr, nullptr, plan);
}

void plan(const char* name, const gfl_integral_args& args, Plan* plan) {
  if (args.saved) fail(std::string(name) + ": saved is for CPUs");
  plan_summary(describe(name, args), args.bins, plan);
}

void plan(const char* name, const gfl_statistics_args& args, Plan* plan) {
  plan_summary(describe(name, args), nullptr, plan);
}

void plan(const char* name, const gfl_moments_args& args, Plan* plan) {
  plan_summary(describe(name, args), args.bins, plan);
}

void plan(const char* name, const gfl_distillation_args& args, double* workspace, Plan* plan) {
  *plan = {};
  const DistillationProblem d = describe(name, args);
  const bool sum = is_sum(args.loss);
  if (sum) check_workspace(name, workspace);
  DistillationShape s{};
  s.rows = rows_of(d.ndim, d.size);
  if (s.rows.count == 0 || (!args.loss && !args.grad)) return;
  s.scale = scale_of(name, args.scale, args.avg_factor);
  s.inverse_temperature = 1 / d.temperature;
  s.bins = d.bins;
  s.pred = steps_of(d.pred, d.ndim);
  s.teacher = steps_of(d.teacher, d.ndim);
  s.weight = steps_of(d.weight, d.ndim);
  s.upstream = steps_of(d.grad_loss, d.ndim);
  s.loss = steps_of(d.loss, d.ndim);
  s.grad = steps_of(d.grad, d.ndim);
  s.simple = simple(s.rows, {&s.pred, &s.teacher, &s.weight, &s.upstream, &s.loss, &s.grad});
  const bool neighbours =
      d.pred.column == 1 && d.teacher.column == 1 && (!d.grad.data || d.grad.column == 1);
  const bool held = neighbours && d.pred.dtype != GFL_FLOAT64 && d.bins <= 32 * kHeldBins;
  if (held) {
    while (kHeldBins << s.lane_bits < d.bins) ++s.lane_bits;
  } else if (d.pred.column == 1) {
    s.lane_bits = std::max(3, lane_bits_for(d.bins));
  }
  Launch* const launch = &plan->launches[plan->count++];
  set_kernel(launch, kDistillationKernel, d.pred.dtype, held ? kHeldBins : 0);
  set_grid(launch, ceil_div(s.rows.count, kDistributionThreads >> s.lane_bits),
           kDistributionThreads);
  for (const Operand* operand : {&d.pred, &d.teacher, &d.weight, &d.grad_loss}) {
    add_argument(launch, static_cast<const void*>(operand->data));
  }
  add_argument(launch, data_of(args.avg_factor));
  add_argument(launch, static_cast<void*>(d.loss.data));
  add_argument(launch, sum ? workspace : nullptr);
  add_argument(launch, static_cast<void*>(d.grad.data));
  add_argument(launch, s);
  if (sum) add_finish(plan, workspace, args.loss, args.avg_factor, s.scale);
}

void plan(const char* name, const gfl_decode_args& args, Plan* plan) {
  *plan = {};
  DecodeProblem d = describe(name, args);
  if (args.bins) {
    d.values.data = static_cast<char*>(args.bins->data);
    d.values.column = args.bins->strides[0];
  }
  DecodeShape s{};
  s.rows = rows_of(d.ndim, d.size);
  if (s.rows.count == 0) return;
  if (d.bins > kSmall || d.classes > kSmall) fail(std::string(name) + ": too many channels");
  s.stride = d.stride;
  s.height = d.height;
  s.width = d.width;
  s.bins = static_cast<int32_t>(d.bins);
  s.classes = static_cast<int32_t>(d.classes);
  s.window = static_cast<int32_t>(std::min<int64_t>(d.window, d.bins));
  s.clips = d.clips;
  s.planes = d.pred.column != 1;
  const struct {
    Steps* steps;
    const Operand* operand;
  } operands[] = {{&s.pred, &d.pred},     {&s.points, &d.points}, {&s.strides, &d.strides},
                  {&s.limits, &d.limits}, {&s.boxes, &d.boxes},   {&s.deviation, &d.deviation},
                  {&s.cls, &d.cls},       {&s.score, &d.score},   {&s.label, &d.label}};
  for (const auto& [steps, operand] : operands) *steps = steps_of(*operand, d.ndim);
  s.values = steps_of(d.values, 0);
  s.simple = simple(s.rows, {&s.pred, &s.points, &s.strides, &s.limits, &s.boxes, &s.deviation,
                             &s.cls, &s.score, &s.label});
  Launch* launch = &plan->launches[plan->count++];
  set_kernel(launch, kDecodeKernel, d.pred.dtype);
  set_grid(launch, ceil_div(s.rows.count, kDecodeThreads / (s.planes ? 1 : 4 * kDecodeLanes)),
           kDecodeThreads);
  for (const Operand* operand : {&d.pred, &d.points, &d.strides, &d.values, &d.limits}) {
    add_argument(launch, static_cast<const void*>(operand->data));
  }
  add_argument(launch, static_cast<void*>(d.boxes.data));
  add_argument(launch, static_cast<void*>(d.deviation.data));
  add_argument(launch, s);
  if (!d.cls.data) return;
  s.lane_bits = d.cls.column == 1 ? lane_bits_for(d.classes) : 0;
  launch = &plan->launches[plan->count++];
  set_kernel(launch, kScoreKernel, d.cls.dtype);
  set_grid(launch, ceil_div(s.rows.count, kDecodeThreads >> s.lane_bits), kDecodeThreads);
  add_argument(launch, static_cast<const void*>(d.cls.data));
  add_argument(launch, static_cast<void*>(d.score.data));
  add_argument(launch, static_cast<void*>(d.label.data));
  add_argument(launch, s);
}

int64_t head_workspace(const char* name, const gfl_head_args& args) {
  return Head(name, args).workspace();
}

void plan_head_boxes(const char* name, const gfl_head_args& args, double* workspace, Plan* plan) {
  *plan = {};
  Head head(name, args);
  if (!workspace) fail(std::string(name) + ": there is no workspace");
  head.add_boxes(plan, workspace);
}

void plan_head(const char* name, const gfl_head_args& args, double* workspace, Plan* plan) {
  *plan = {};
  Head head(name, args);
  if (args.losses[0]) {
    if (!workspace) fail(std::string(name) + ": losses need a workspace");
    head.add_classes(plan, workspace, false);
  }
  if (args.grad_box) {
    head.add_classes(plan, nullptr, true);
    head.add_box_grad(plan);
  }
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
GFL_API int gfl_statistics_cuda_plan(const gfl_statistics_args* args, gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_statistics_cuda", *args, plan); });
}
GFL_API int gfl_moments_cuda_plan(const gfl_moments_args* args, gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_moments_cuda", *args, plan); });
}
GFL_API int gfl_distillation_cuda_plan(const gfl_distillation_args* args, double* workspace,
                                       gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_distillation_cuda", *args, workspace, plan); });
}
GFL_API int gfl_decode_cuda_plan(const gfl_decode_args* args, gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan("gfl_decode_cuda", *args, plan); });
}
GFL_API int gfl_head_boxes_cuda_plan(const gfl_head_args* args, double* workspace,
                                     gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan_head_boxes("gfl_head_boxes_cuda", *args, workspace, plan); });
}
GFL_API int gfl_head_cuda_plan(const gfl_head_args* args, double* workspace, gfl::Plan* plan) {
  return gfl::guarded([&] { gfl::plan_head("gfl_head_cuda", *args, workspace, plan); });
}
GFL_API int64_t gfl_cuda_plan_bytes(void) { return sizeof(gfl::Plan); }
}
