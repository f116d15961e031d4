// What the headers of glibc 2.32 and libstdc++ 9 to 12 call, and earlier releases lack: with these
// definitions, what GCC 12 compiles needs no symbol after glibc 2.27 and libstdc++ 8.
#include <exception>
#include <new>
#include <sstream>

template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;

#ifdef __GLIBCXX__

#define EVAKERNELS_SYMBOL(name) __asm__(name) __attribute__((visibility("hidden")))

extern "C" {

// Whether the process has a single thread. Never assumed: reference counts stay atomic.
extern char single_threaded EVAKERNELS_SYMBOL("__libc_single_threaded");
char single_threaded = 0;

[[noreturn]] void throw_bad_array_length() EVAKERNELS_SYMBOL("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_length() { throw std::bad_array_new_length(); }

// exception_ptr::_M_addref and _M_release, by the copy constructor and the destructor, which every libstdc++
// exports.
void copy(void* to, const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

void add_reference(void* pointer) EVAKERNELS_SYMBOL("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(void* pointer) {
  alignas(std::exception_ptr) char kept[sizeof(std::exception_ptr)];
  copy(kept, pointer);
}

void release(void* pointer) EVAKERNELS_SYMBOL("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void* pointer) { destroy(pointer); }

}  // extern "C"

#endif
