// What the glue takes of android.content, on directories of this machine.
package android.content

import android.app.ActivityManager
import android.net.Uri
import java.io.File
import java.io.InputStream

open class Context(private val packaged: File, val noBackupFilesDir: File) {
  val assets = AssetManager()
  val contentResolver = ContentResolver()

  fun getSystemService(name: String): Any {
    check(name == ACTIVITY_SERVICE)
    return ActivityManager()
  }

  inner class AssetManager {
    fun open(fileName: String): InputStream = File(packaged, fileName).inputStream()
  }

  companion object {
    const val ACTIVITY_SERVICE = "activity"
  }
}

class ContentResolver {
  fun openInputStream(uri: Uri): InputStream? = File(uri.path).takeIf(File::exists)?.inputStream()
}
