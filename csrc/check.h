// One error type for everything a caller can get wrong. Derives from std::invalid_argument, which the binding turns
// into Python's ValueError; nothing here knows about Python.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace cfrt {

struct Error : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// check(ok, "expected ..., got ", value): the message is put together only when it is needed.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
    if (ok) return;
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
}

}  // namespace cfrt
