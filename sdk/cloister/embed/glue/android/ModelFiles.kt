// Where the model's files come from on Android: assets, or a file that the user picks.
package cloister

import android.app.ActivityManager
import android.content.Context
import android.net.Uri
import java.io.File
import java.io.FileOutputStream
import java.io.InputStream
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.withContext

class NotEnoughSpace(name: String, needed: Long, free: Long) : Refused(
    "$name takes $needed bytes of storage and $free are free; free some and try again.")

/** Returns what a model meets here; `executorch` is BuildConfig.EXECUTORCH (see app.gradle.kts). */
fun Context.device(executorch: String): Device {
    val memory = ActivityManager.MemoryInfo()
    (getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
    return Device(executorch, memory.availMem - memory.threshold, noBackupFilesDir)
}

/** Returns the directory for copies of the model's files, without those of another release.
 *
 * It is left out of the user's backups: the files come with the app.
 */
fun Context.modelDirectory(model: Model): File {
    val directory = File(noBackupFilesDir, "model-${model.program.sha256.take(16)}")
    noBackupFilesDir.listFiles { file -> file.name.startsWith("model-") && file != directory }
        ?.forEach { it.deleteRecursively() }
    return directory.apply { mkdirs() }
}

/** Copies the model out of the app's assets, or of an install-time pack: the runner takes paths. */
suspend fun Context.copyFromAssets(model: Model, progress: Progress = Progress { _, _ -> }): File {
    for (file in listOf(model.program, model.tokenizer)) {
        copy(model, file, progress) { assets.open(file.name) }
    }
    return modelDirectory(model)
}

/** Copies `file` of the model from `uri`, which the user picked by ACTION_OPEN_DOCUMENT. */
suspend fun Context.copyPicked(
    model: Model, file: ModelFile, uri: Uri, progress: Progress = Progress { _, _ -> },
): File {
    copy(model, file, progress) {
        contentResolver.openInputStream(uri) ?: throw FileMissing(file.name)
    }
    return modelDirectory(model)
}

private suspend fun Context.copy(
    model: Model, file: ModelFile, progress: Progress, open: () -> InputStream,
) = withContext(Dispatchers.IO) {
    val target = File(modelDirectory(model), file.name)
    if (target.length() == file.bytes) return@withContext  // its hash is checked at every start
    val free = noBackupFilesDir.usableSpace
    if (free < file.bytes) throw NotEnoughSpace(file.name, file.bytes, free)
    val part = File(target.path + ".part")
    try {
        open().use { input ->
            FileOutputStream(part).use { output ->
                val block = ByteArray(1 shl 20)
                var done = 0L
                while (true) {
                    val count = input.read(block)
                    if (count < 0) break
                    ensureActive()
                    done += count
                    if (done > file.bytes) throw FileDiffers(file.name)
                    output.write(block, 0, count)
                    progress.at(Stage.COPY, done.toFloat() / file.bytes)
                }
                output.fd.sync()
            }
        }
        verify(part, file) {}
        part.renameTo(target)
    } finally {
        part.delete()
    }
}
