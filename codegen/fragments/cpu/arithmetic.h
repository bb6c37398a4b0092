// The processor's arithmetic as definitions have it, for one thread: a process may have switched subnormals off.
struct Arithmetic {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  Arithmetic() { _mm_setcsr(0x1f80); }
  ~Arithmetic() { _mm_setcsr(before); }
#endif
};
