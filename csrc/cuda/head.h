// What the kernels of a head share. Device code, internal linkage.
#pragma once

#include "common.h"

namespace gfl {

// The cells of this block, of one image of a level.
struct Tile {
  int level, image, first, count;
};

GFL_DEVICE Tile tile_of_block(const HeadShape& s) {
  const int number = blockIdx.x;
  int level = 0;
  while (level + 1 < s.count && number >= s.levels[level + 1].first_tile) ++level;
  const HeadLevel& l = s.levels[level];
  const int in_level = number - l.first_tile, image = divide(in_level, l.tiles);
  const int first = (in_level - image * l.tiles) * s.tile_cells;
  return Tile{level, image, first, min(s.tile_cells, l.cells - first)};
}

// Where a cell's first element is.
GFL_DEVICE int64_t offset_of_cell(const HeadMatrix& matrix, const HeadLevel& level, int image,
                                  int cell) {
  const int64_t start = image * matrix.image;
  if (level.width == level.cells) return start + cell * matrix.cell;
  const int row = divide(cell, level.width);
  return start + row * matrix.row + (cell - row * level.width) * matrix.cell;
}
GFL_DEVICE int64_t offset_of_cell(const HeadVector& vector, int image, int cell) {
  return image * vector.image + cell * vector.cell;
}

// A NaN stays one.
GFL_DEVICE double at_least_1(double x) { return x < 1 ? 1 : x; }

// What a loss, of classes or of boxes, is multiplied by.
template <typename A>
GFL_DEVICE double class_factor(const HeadShape& s, const void* normalisers) {
  const double divisor = static_cast<const A*>(normalisers)[0];
  return s.loss_weights[0] / (s.dense ? at_least_1(divisor) : divisor + kEps);
}
template <typename A>
GFL_DEVICE double box_factor(const HeadShape& s, const void* normalisers, int term) {
  return s.loss_weights[term] / at_least_1(static_cast<const A*>(normalisers)[s.normaliser_step]);
}

// The upstream gradient of a term (classes, box, DFL) at a level: of its total, of the level, both,
// or 0 for neither.
template <typename A>
GFL_DEVICE double upstream_of_level(const HeadShape& s, const void* total, const void* levels,
                                    int term, int level) {
  if (s.unit_upstream) return 1;
  double result = 0;
  if (total) result += *static_cast<const A*>(total);
  if (levels) result += static_cast<const A*>(levels)[level * s.level_steps[term]];
  return result;
}

// The sum of n values by a warp, in a fixed order.
GFL_DEVICE double sum_of_values(const double* values, int n) {
  double total = 0;
#pragma unroll 8  // so many loads at once
  for (int i = threadIdx.x % 32; i < n; i += 32) total += values[i];
  return sum_lanes(total, 32);
}

}  // namespace gfl
