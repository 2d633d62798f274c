// Operators as torch calls them: records of arguments, unpacked from the dispatcher's stack.
//
// A record is an aggregate whose members, nested records included, are in the order of the schema:
//
//   struct Arguments { Tensor input; Maybe bias; };
//   struct Call { Arguments args; bool save; };
//   std::tuple<Tensor, Tensor> forward(Call& call);
//   library.impl("forward", &boxed<forward>);
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/tensors.h"

namespace throughtime {

namespace detail {

// One argument on the stack: becomes what the member that it initialises is.
struct Argument {
  StableIValue value;

  template <typename T,
            std::enable_if_t<std::is_same_v<T, Tensor> || std::is_same_v<T, bool> ||
                                 std::is_same_v<T, int64_t> || std::is_same_v<T, double>,
                             int> = 0>
  operator T() const {
    return torch::stable::detail::to<T>(value);
  }
  operator Maybe() const { return Maybe(torch::stable::detail::to<OptionalTensor>(value)); }
};

template <size_t>
using Any = Argument;

template <typename Record, typename Places, typename = void>
struct Takes : std::false_type {};
template <typename Record, size_t... places>
struct Takes<Record, std::index_sequence<places...>,
             std::void_t<decltype(Record{std::declval<Any<places>>()...})>> : std::true_type {};

// The number of members of a record, those of nested records counted one by one.
template <typename Record, size_t most = 32>
constexpr size_t members() {
  if constexpr (Takes<Record, std::make_index_sequence<most>>::value) {
    return most;
  } else {
    return members<Record, most - 1>();
  }
}

template <typename Record, size_t... places>
Record unpacked(StableIValue* stack, std::index_sequence<places...>) {
  return Record{Argument{stack[places]}...};
}

template <typename Function>
struct Signature;
template <typename Results, typename Record>
struct Signature<Results (*)(Record&)> {
  using Call = Record;
};

template <typename... Results, size_t... places>
void pack(StableIValue* stack, const std::tuple<Results...>& results,
          std::index_sequence<places...>) {
  ((stack[places] = torch::stable::detail::from(std::get<places>(results))), ...);
}

}  // namespace detail

// Calls `function`, which takes a record and returns a tuple of tensors, with what is on the stack.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  using Call = typename detail::Signature<decltype(function)>::Call;
  constexpr size_t count = detail::members<Call>();
  TT_CHECK(arguments == count, "throughtime: a schema lists ", arguments,
           " arguments, and its C++ record has ", count);
  Call call = detail::unpacked<Call>(stack, std::make_index_sequence<count>());
  const auto found = function(call);
  constexpr size_t given = std::tuple_size_v<std::decay_t<decltype(found)>>;
  TT_CHECK(results == given, "throughtime: a schema lists ", results, " results, and C++ gives ",
           given);
  detail::pack(stack, found, std::make_index_sequence<given>());
}

}  // namespace throughtime
