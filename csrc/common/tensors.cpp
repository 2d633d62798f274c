#include "tensors.h"

#include <array>
#include <cstring>

namespace throughtime {
namespace {

template <typename S>
void add(const Tensor& a, const Tensor& b, const Tensor& sum) {
  for (int64_t i = 0; i < sum.numel(); ++i) mutable_data<S>(sum)[i] = data<S>(a)[i] + data<S>(b)[i];
}

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
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

void fill_zero(const Tensor& tensor) {
  if (tensor.numel() > 0) torch::stable::zero_(const_cast<Tensor&>(tensor));
}

void copy(const Tensor& from, const Tensor& to) {
  if (from.numel() > 0)
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.numel() * from.element_size());
}

OptionalTensor sum_of(const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  if (!bias_ih || !bias_hh) return dense(bias_ih ? bias_ih : bias_hh);
  const Tensor a = dense(*bias_ih), b = dense(*bias_hh);
  const Tensor sum = pooled({a.numel()}, a.scalar_type());
  if (a.scalar_type() == ScalarType::Float) {
    add<float>(a, b, sum);
  } else {
    add<double>(a, b, sum);
  }
  return sum;
}

}  // namespace throughtime
