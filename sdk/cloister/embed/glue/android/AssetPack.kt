// The model as a fast-follow pack of Play Asset Delivery: no second copy on the device.
// Needs com.google.android.play:asset-delivery; leave this file out if you use no pack.
package cloister

import android.content.Context
import com.google.android.play.core.assetpacks.AssetPackManager
import com.google.android.play.core.assetpacks.AssetPackManagerFactory
import com.google.android.play.core.assetpacks.AssetPackStateUpdateListener
import com.google.android.play.core.assetpacks.model.AssetPackStatus
import java.io.File
import kotlin.coroutines.resume
import kotlin.coroutines.resumeWithException
import kotlinx.coroutines.suspendCancellableCoroutine

private const val PACK = "model"

class PackFailed(code: Int) : Refused("Play could not deliver the model (code $code); try again.")

/** Returns the directory of the pack's files, when Play has them on the device.
 *
 * `confirm` is called where Play wants the user's consent first (no Wi-Fi, a large download): call
 * `showConfirmationDialog` of the manager there.
 */
suspend fun Context.modelFromPack(
    confirm: (AssetPackManager) -> Unit, progress: Progress = Progress { _, _ -> },
): File = suspendCancellableCoroutine { waiting ->
    val manager = AssetPackManagerFactory.getInstance(this)
    fun directory() = manager.getPackLocation(PACK)?.assetsPath()?.let(::File)
    val listener = object : AssetPackStateUpdateListener {
        override fun onStateUpdate(state: com.google.android.play.core.assetpacks.AssetPackState) {
            if (state.name() != PACK || !waiting.isActive) return
            when (state.status()) {
                AssetPackStatus.COMPLETED -> directory()?.let {
                    manager.unregisterListener(this)
                    waiting.resume(it)
                }
                AssetPackStatus.FAILED, AssetPackStatus.CANCELED -> {
                    manager.unregisterListener(this)
                    waiting.resumeWithException(PackFailed(state.errorCode()))
                }
                AssetPackStatus.REQUIRES_USER_CONFIRMATION -> confirm(manager)
                else -> if (state.totalBytesToDownload() > 0) progress.at(
                    Stage.COPY, state.bytesDownloaded().toFloat() / state.totalBytesToDownload())
            }
        }
    }
    when (val there = directory()) {
        null -> {
            manager.registerListener(listener)
            waiting.invokeOnCancellation { manager.unregisterListener(listener) }
            manager.fetch(listOf(PACK))
        }
        else -> waiting.resume(there)
    }
}
