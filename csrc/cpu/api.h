// What the files with the C functions share.
#pragma once

#include "../error.h"
#include "gfl_kernels/gfl_kernels.h"
#include "kernels.h"

namespace gfl {

// eps(float32), which mmdetection adds to avg_factor.
constexpr double kEps = 1.1920928955078125e-07;

// Memory of this thread for the kernels' tiles, aligned to 64. Kept: a hundred kilobytes taken from
// and given back to malloc at every call can cost more than a small call itself.
void* thread_scratch(int64_t bytes);

// The kernels in use; fails if there are none.
const KernelTable& table();

// The sum of the weighted row losses, not scaled.
double run_quality(const QualityProblem& problem);

}  // namespace gfl
