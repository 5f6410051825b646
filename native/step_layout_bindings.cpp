#include "step_layout_bindings.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "step_layout.hpp"

namespace nb = nanobind;

namespace shoestring {
namespace {

using Buffer = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = std::vector<int32_t>;
using Tree = std::tuple<Ints, Ints, int32_t, int32_t, Ints, Ints, Ints>;
using Moved = std::tuple<int32_t, int32_t, Ints>;

// (draft, cached, row of the table, places of its embeddings), or a tree's lists.
LaidTree laid_from(const nb::tuple& tree) {
  if (const Drafted* drafted = nullptr; tree.size() == 4 && nb::try_cast(tree[0], drafted)) {
    return laid_tree(*drafted, nb::cast<int32_t>(tree[1]), nb::cast<int32_t>(tree[2]), nb::cast<Ints>(tree[3]));
  }
  auto [tokens, parents, cached, table_row, rows, places, outputs] = nb::cast<Tree>(tree);
  return {std::move(tokens), std::move(parents), cached,           table_row,
          std::move(rows),   std::move(places),  std::move(outputs)};
}

// Keeps the buffer alive with what writes into it.
struct HeldLayout {
  Buffer buffer;
  StepLayout layout;
};

}  // namespace

void bind_step_layout(nb::module_& module) {
  nb::class_<HeldLayout>(module, "StepLayout")
      .def(
          "__init__",
          [](HeldLayout* self, Buffer buffer, size_t slots, size_t rows, size_t moves, const std::vector<size_t>& offsets) {
            StepLayout layout(buffer.data(), buffer.shape(0), slots, rows, moves, offsets);
            new (self) HeldLayout{std::move(buffer), std::move(layout)};
          },
          nb::arg("buffer"), nb::arg("slots"), nb::arg("rows"), nb::arg("moves"), nb::arg("offsets"))
      .def(
          "fill",
          [](HeldLayout& self, const nb::list& trees, std::vector<Moved> moves) {
            std::vector<LaidTree> laid;
            laid.reserve(trees.size());
            for (const nb::handle tree : trees) laid.push_back(laid_from(nb::cast<nb::tuple>(tree)));
            std::vector<LaidMoves> moved;
            for (auto& [table_row, cached, rows] : moves) moved.push_back({table_row, cached, std::move(rows)});
            return self.layout.fill(laid, moved);
          },
          nb::arg("trees"), nb::arg("moves"));
}

}  // namespace shoestring
