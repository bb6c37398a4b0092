// Packed codes to quads. A quad is 64 bytes: 16 outputs x 4 consecutive k, one code per byte; a block of 32 k has 8.
// In memory a block is a sequence of bit planes (PLANES); field i of a byte in tile t of a plane belongs to quad
// t * (8 / width) + i, so a quad is a shift and a mask of one 64-byte tile, per plane.
// prelude: struct Plane { width, shift, offset }, PLANES, BITS, MAP, LEVELS8.
struct Planes {
  static constexpr int BYTES = 64 * BITS;
  template <int Q> static INL VI quad(const uint8_t* block) {
    VI code = iset(0);
    each<PLANE_COUNT>(LAMBDA {
      constexpr Plane plane = PLANES[index_];
      constexpr int fields = 8 / plane.width;
      VI tile = iload(block + plane.offset + Q / fields * 64);
      VI field = plane.width == 8 ? tile : bfield<Q % fields * plane.width, (1 << plane.width) - 1>(tile);
      code = index_ == 0 ? field : ior(code, bshl<plane.shift>(field));
    });
    // Levels that are not consecutive integers (ternary, binary, e2m1, ...), times a power of two that makes them so.
    return MAP ? bmap16(code, LEVELS8) : code;
  }
  static INL void prefetch(const uint8_t* block) {
    UNROLL for (int i = 0; i < BITS; i++) __builtin_prefetch(block + AHEAD + 64 * i);
  }
};
