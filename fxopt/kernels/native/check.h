// Errors: a failed check raises fxopt.errors.KernelError in Python.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/StringUtil.h>

#include <string>

namespace fxopt {

// The exception class lives in Python. The message travels there through an operator, and the
// exception comes back through the dispatcher with its own type.
[[noreturn]] inline void raise_kernel_error(const std::string& message) {
  c10::Dispatcher::singleton()
      .findSchemaOrThrow("fxopt::raise_kernel_error", "")
      .typed<void(c10::string_view)>()
      .call(message);
  TORCH_CHECK(false, message);
}

}  // namespace fxopt

#define FXOPT_CHECK(condition, ...)                        \
  do {                                                     \
    if (C10_UNLIKELY(!(condition))) {                      \
      ::fxopt::raise_kernel_error(c10::str(__VA_ARGS__));  \
    }                                                      \
  } while (false)
