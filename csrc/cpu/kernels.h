// What the instruction-set specific kernels (quality.cpp, distribution.cpp, head.cpp, decode.cpp,
// distillation.cpp) and the code that drives them (api.cpp, head_api.cpp) agree on.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace gfl {

// Rows [begin, begin + count) of the innermost dimension, the operands' data already moved to the
// outer index. Returns the sum of the weighted row losses, not scaled. scratch:
// scratch_bytes(problem) bytes, aligned to 64, any content.
struct KernelTable {
  const char* name;
  double (*quality)(const QualityProblem&, int64_t begin, int64_t count, void* scratch);
  double (*distribution)(const DistributionProblem&, int64_t begin, int64_t count, void* scratch);
  // Cells [begin, begin + count) of an image, count at most kHeadCells.
  HeadSums (*head)(const HeadProblem&, int64_t image, int64_t begin, int64_t count, void* scratch);
  double (*decode)(const DecodeProblem&, int64_t begin, int64_t count, void* scratch);  // 0
  double (*distillation)(const DistillationProblem&, int64_t begin, int64_t count, void* scratch);
};

#define GFL_DECLARE_KERNELS(isa)                                                  \
  double quality_##isa(const QualityProblem&, int64_t, int64_t, void*);           \
  double distribution_##isa(const DistributionProblem&, int64_t, int64_t, void*); \
  HeadSums head_##isa(const HeadProblem&, int64_t, int64_t, int64_t, void*);      \
  double decode_##isa(const DecodeProblem&, int64_t, int64_t, void*);             \
  double distillation_##isa(const DistillationProblem&, int64_t, int64_t, void*);
GFL_DECLARE_KERNELS(baseline)
GFL_DECLARE_KERNELS(avx2)
GFL_DECLARE_KERNELS(avx512)
#undef GFL_DECLARE_KERNELS

// The functions below are static: without optimisation, inline ones would be shared by the kernels
// of different instruction sets.

constexpr int64_t kHeadCells = 1024;
// Labels and positives of the cells, logits of a positive, four sides of bins with a positive per
// lane.
static constexpr int64_t head_scratch_bytes(int64_t classes, int64_t bins) {
  return 2 * kHeadCells * 8 + (classes + 4 * bins) * 8 + 4 * bins * 64 + 1024;
}

// Elements a tile holds at most, unless a single row is longer. Small enough for L1 with its
// targets and weights.
constexpr int64_t kTile = 1536;

// Rows at most of a tile whose classes lie in planes. Each plane's part is a run of memory whose
// start no prefetcher knows: runs of a page took a third less time than those of 307 rows.
constexpr int64_t kPlaneRows = 1024;

// Whether neighbouring rows are neighbours in memory and neighbouring classes are not: NCHW.
static constexpr bool in_planes(const QualityProblem& p) {
  const int inner = p.ndim - 1;
  return p.pred.row[inner] == 1 && !(p.pred.column == 1 && p.classes > 1) &&
         (!p.grad.data || p.grad.row[inner] == 1);
}

static constexpr int64_t tile_elements(int64_t columns) {
  return columns > kTile ? columns : kTile;
}
// Classes whose targets are turned into planes together: a cache line of rows of them.
constexpr int64_t kTurned = 16;
// Fourteen arrays of at most 8 bytes an element, each with a vector's room behind it.
static constexpr int64_t scratch_bytes(const QualityProblem& q) {
  return 14 * (tile_elements(q.classes) * 8 + 128) +
         (in_planes(q) ? kTurned * kPlaneRows * 8 + 128 : 0);
}
// Four arrays of four vectors per bin.
static constexpr int64_t scratch_bytes(const DistributionProblem& d) {
  return 4 * (d.bins * 256 + 128);
}
// Two vectors per bin.
static constexpr int64_t scratch_bytes(const DistillationProblem& d) { return d.bins * 128 + 128; }
// Four vectors and those of exponentials per bin, and its value.
static constexpr int64_t scratch_bytes(const DecodeProblem& d) {
  return d.bins * (256 + 256 + 8) + 512;
}

// The table in use, or null if GFL_CPU_ISA asks for one that cannot run here.
const KernelTable* kernels();

}  // namespace gfl
