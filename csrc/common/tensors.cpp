#include "tensors.h"

#include <array>
#include <stdexcept>

namespace throughtime {
namespace {

std::string text(const int64_t* sizes, size_t count) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

}  // namespace

void check_shape(const char* op, const char* argument, const Tensor& tensor,
                 std::initializer_list<int64_t> wanted) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == wanted.size();
  for (size_t i = 0; equal && i < wanted.size(); ++i) equal = sizes[i] == wanted.begin()[i];
  STD_TORCH_CHECK(equal, op, ": ", argument, " should have shape ",
                  text(wanted.begin(), wanted.size()), ", got ", text(sizes.data(), sizes.size()));
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, op, ": ", argument, " should have dtype ",
                  torch::headeronly::toString(wanted), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", argument, " should be on the CPU, as the others are");
}

Tensor dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  const auto contiguous = torch::headeronly::MemoryFormat::Contiguous;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(contiguous)};
  if (torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION) !=
      TORCH_SUCCESS) {
    const auto sizes = tensor.sizes();
    throw std::runtime_error("throughtime: can't allocate memory for a contiguous copy of " +
                             text(sizes.data(), sizes.size()) + " " +
                             torch::headeronly::toString(tensor.scalar_type()) +
                             ": pass a contiguous tensor, fewer steps or a smaller batch");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

void fill_zero(const Tensor& tensor) {
  if (tensor.numel() > 0) torch::stable::zero_(const_cast<Tensor&>(tensor));
}

}  // namespace throughtime
