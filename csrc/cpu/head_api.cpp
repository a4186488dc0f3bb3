// The losses of a whole head: gfl_head_boxes_cpu and gfl_head_cpu of gfl_kernels.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "api.h"

namespace gfl {
namespace {

// Blocks of cells that are worth a thread.
constexpr int64_t kHeadGrain = 4;

double read(const gfl_view& view, int64_t index) {
  const int64_t at = view.ndim ? index * view.strides[0] : 0;
  return view.dtype == GFL_FLOAT64 ? static_cast<const double*>(view.data)[at]
                                   : static_cast<const float*>(view.data)[at];
}

void write(const gfl_view& view, int64_t index, double value) {
  const int64_t at = view.ndim ? index * view.strides[0] : 0;
  if (view.dtype == GFL_FLOAT64) {
    static_cast<double*>(view.data)[at] = value;
  } else {
    static_cast<float*>(view.data)[at] = static_cast<float>(value);
  }
}

// A level's box loss and DFL in `sums`.
gfl_view row_of(const gfl_view& sums, int64_t level) {
  char* const data = static_cast<char*>(sums.data);
  return {data + level * sums.strides[0] * element_bytes(sums.dtype), sums.dtype, 1, sums.sizes + 1,
          sums.strides + 1};
}

std::vector<HeadProblem> describe_levels(const char* name, const gfl_head_args& args) {
  if (args.levels < 1 || !args.sums || !args.normalisers) fail("gfl_head: arguments are missing");
  std::vector<HeadProblem> levels;
  int64_t first = 0;
  for (int l = 0; l < args.levels; ++l) {
    levels.push_back(describe(name, args, l, first));
    first += levels.back().cells;
  }
  return levels;
}

// Runs the kernel over the cells of all levels, block by block, and adds the blocks' sums in their
// order. add(level, image, sums)
template <typename Add>
void run_head(const std::vector<HeadProblem>& levels, const Add& add) {
  struct Block {
    const HeadProblem* level;
    int64_t image, begin, count;
  };
  std::vector<Block> blocks;
  int64_t scratch = 0;
  for (const HeadProblem& level : levels) {
    scratch = std::max(scratch, head_scratch_bytes(level.classes, level.bins));
    for (int64_t image = 0; image < level.batch; ++image) {
      for (int64_t begin = 0; begin < level.cells; begin += kHeadCells) {
        blocks.push_back({&level, image, begin, std::min(kHeadCells, level.cells - begin)});
      }
    }
  }
  std::vector<HeadSums> sums(blocks.size());
  const auto head = table().head;
  const auto body = [&](int64_t begin, int64_t end) {
    void* const memory = thread_scratch(scratch);
    for (int64_t b = begin; b < end; ++b) {
      const Block& block = blocks[b];
      sums[b] = head(*block.level, block.image, block.begin, block.count, memory);
    }
  };
  const int64_t count = static_cast<int64_t>(blocks.size());
  if (count > 0) torch::stable::parallel_for(0, count, kHeadGrain, body);
  for (size_t b = 0; b < blocks.size(); ++b) {
    add(blocks[b].level - levels.data(), blocks[b].image, sums[b]);
  }
}

// The classification of a level: a problem of the quality family with that level's cells as rows.
class LevelQuality {
 public:
  LevelQuality(const gfl_head_args& args, int level, const HeadProblem& head)
      : cls_(args.cls[level]), head_(head) {
    args_.pred = &cls_;
    if (args.targets) {
      args_.target = &args.targets[level];
    } else {
      args_.target = per_cell(&label_, args.labels[level]);
      args_.score = joint(args.quality->dtype);
    }
    if (args.label_weights) args_.weight = per_cell(&weight_, args.label_weights[level]);
    args_.grad = args.grad_cls ? &args.grad_cls[level] : nullptr;
    args_.form = args.form;
    args_.alpha = args.alpha;
    args_.beta = args.beta;
  }
  LevelQuality(const LevelQuality&) = delete;

  double run(double scale) {
    args_.scale = scale;
    return run_quality(describe("gfl_head_cpu", args_));
  }

 private:
  struct View {
    gfl_view view;
    int64_t strides[3];
  };

  // [B, n] as [B, cells...]
  const gfl_view* per_cell(View* to, const gfl_view& from) const {
    return make(to, from.data, from.dtype, from.strides[0], from.strides[1]);
  }
  const gfl_view* joint(gfl_dtype dtype) {
    return make(&score_, head_.quality.data, dtype, head_.quality.row[0], 1);
  }
  const gfl_view* make(View* to, void* data, gfl_dtype dtype, int64_t image, int64_t cell) const {
    to->view = {data, dtype, cls_.ndim - 1, cls_.sizes, to->strides};
    to->strides[0] = image;
    to->strides[1] = cls_.ndim == 4 ? cell * head_.width : cell;
    to->strides[2] = cell;
    return &to->view;
  }

  const gfl_view& cls_;
  const HeadProblem& head_;
  View label_, score_, weight_;
  gfl_quality_args args_{};
};

}  // namespace
}  // namespace gfl

extern "C" int gfl_head_boxes_cpu(const gfl_head_args* args) {
  using namespace gfl;
  return guarded([&] {
    std::vector<HeadProblem> levels = describe_levels("gfl_head_boxes_cpu", *args);
    for (HeadProblem& level : levels) level.grad.data = nullptr;
    std::vector<double> positives(levels[0].batch);
    std::vector<HeadSums> sums(levels.size(), HeadSums{});
    run_head(levels, [&](int64_t level, int64_t image, const HeadSums& s) {
      positives[image] += s.count;
      sums[level].weight += s.weight;
      sums[level].bbox += s.bbox;
      sums[level].dfl += s.dfl;
    });
    double count = 0, weight = 0;
    for (const double n : positives) count += std::max(n, 1.0);
    for (size_t l = 0; l < levels.size(); ++l) {
      weight += sums[l].weight;
      const gfl_view row = row_of(*args->sums, static_cast<int64_t>(l));
      write(row, 0, sums[l].bbox);
      write(row, 1, sums[l].dfl);
    }
    write(*args->normalisers, 0, args->targets ? weight : count);
    write(*args->normalisers, 1, weight);
  });
}

extern "C" int gfl_head_cpu(const gfl_head_args* args) {
  using namespace gfl;
  return guarded([&] {
    std::vector<HeadProblem> levels = describe_levels("gfl_head_cpu", *args);
    const double first = read(*args->normalisers, 0);
    // A NaN stays one: std::max would drop it.
    const auto at_least_1 = [](double x) { return x < 1 ? 1 : x; };
    const double by_box = 1 / at_least_1(read(*args->normalisers, 1));
    const double factors[] = {
        args->loss_weights[0] / (args->targets ? at_least_1(first) : first + kEps),
        args->loss_weights[1] * by_box, args->loss_weights[2] * by_box};
    // The upstream gradient of a term and level.
    const auto upstream = [&](int term, int64_t level) {
      if (args->losses[0]) return 1.0;
      const gfl_view *total = args->grad_losses[term], *each = args->grad_losses[3 + term];
      return (total ? read(*total, 0) : 0) + (each ? read(*each, level) : 0);
    };

    double totals[3] = {};
    for (int l = 0; l < args->levels; ++l) {
      HeadProblem& level = levels[l];
      const double sum = LevelQuality(*args, l, level).run(factors[0] * upstream(0, l));
      level.bbox_scale = factors[1] * upstream(1, l);
      level.dfl_scale = factors[2] * upstream(2, l);
      if (!args->losses[0]) continue;
      const gfl_view row = row_of(*args->sums, l);
      const double losses[] = {sum * factors[0], read(row, 0) * factors[1],
                               read(row, 1) * factors[2]};
      for (int term = 0; term < 3; ++term) {
        write(*args->losses[3 + term], l, losses[term]);
        totals[term] += losses[term];
      }
    }
    for (int term = 0; term < 3 && args->losses[0]; ++term) {
      write(*args->losses[term], 0, totals[term]);
    }
    if (args->grad_box) run_head(levels, [](int64_t, int64_t, const HeadSums&) {});
  });
}
