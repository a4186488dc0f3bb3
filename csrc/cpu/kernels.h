// What the instruction-set specific kernels (kernels.cpp) and the code that drives them (api.cpp)
// agree on.
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

// One function per instruction set, in head.cpp.
HeadSums head_baseline(const HeadProblem&, int64_t, int64_t, int64_t, void*);
HeadSums head_avx2(const HeadProblem&, int64_t, int64_t, int64_t, void*);
HeadSums head_avx512(const HeadProblem&, int64_t, int64_t, int64_t, void*);

// In decode.cpp.
double decode_baseline(const DecodeProblem&, int64_t, int64_t, void*);
double decode_avx2(const DecodeProblem&, int64_t, int64_t, void*);
double decode_avx512(const DecodeProblem&, int64_t, int64_t, void*);

// In distillation.cpp.
double distillation_baseline(const DistillationProblem&, int64_t, int64_t, void*);
double distillation_avx2(const DistillationProblem&, int64_t, int64_t, void*);
double distillation_avx512(const DistillationProblem&, int64_t, int64_t, void*);

constexpr int64_t kHeadCells = 1024;
// Labels and positives of the cells, logits of a positive, four sides of bins with a positive per
// lane.
constexpr int64_t head_scratch_bytes(int64_t classes, int64_t bins) {
  return 2 * kHeadCells * 8 + (classes + 4 * bins) * 8 + 4 * bins * 64 + 1024;
}

// Elements a tile holds at most, unless a single row is longer. Small enough for L1 with its
// targets and weights.
constexpr int64_t kTile = 1536;

constexpr int64_t tile_elements(int64_t columns) { return columns > kTile ? columns : kTile; }
// Nine arrays of at most 8 bytes an element, each with a vector's room behind it.
constexpr int64_t scratch_bytes(const QualityProblem& q) {
  return 9 * (tile_elements(q.classes) * 8 + 128);
}
// Four arrays of four vectors per bin.
constexpr int64_t scratch_bytes(const DistributionProblem& d) { return 4 * (d.bins * 256 + 128); }
// Four vectors per bin, of as many sides; two, of student and teacher.
constexpr int64_t scratch_bytes(const DecodeProblem& d) { return d.bins * 256 + 128; }
constexpr int64_t scratch_bytes(const DistillationProblem& d) { return d.bins * 128 + 128; }

extern const KernelTable kBaseline;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;

// The table in use, or null if GFL_CPU_ISA asks for one that cannot run here.
const KernelTable* kernels();

}  // namespace gfl
