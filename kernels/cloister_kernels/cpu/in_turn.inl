// Tiles one by one, each by the `multiplied` of the file that includes this.
namespace {

void tiles(int64_t format, const uint8_t *weights, int64_t count, const Rows &x, int64_t first,
           int64_t rows, float *out, int64_t stride) {
  for (; count > 0; --count, weights += tile_bytes(format, x.inputs), out += kTile)
    DISPATCH(multiplied, format, weights, x, first, rows, out, stride)
}

}  // namespace
