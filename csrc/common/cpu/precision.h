// How exact products of float32 are to be: torch.get_float32_matmul_precision().
#pragma once

namespace throughtime {

// bfloat16 parts of a number in products (common/cpu/split.h): three for "highest", which is torch's
// default, two for "high", one for "medium".
int float32_parts_asked();

}  // namespace throughtime
