// What the glue takes of android.app.
package android.app

class ActivityManager {
  class MemoryInfo {
    @JvmField var availMem = 0L
    @JvmField var threshold = 0L
  }

  fun getMemoryInfo(outInfo: MemoryInfo) {
    outInfo.availMem = 3_000_000_000
    outInfo.threshold = 200_000_000
  }
}
