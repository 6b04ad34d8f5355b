// What the glue takes of com.google.android.play:asset-delivery 2.3.0.
package com.google.android.play.core.assetpacks

import android.content.Context

interface AssetPackLocation {
  fun assetsPath(): String?
}

interface AssetPackState {
  fun name(): String

  fun status(): Int

  fun errorCode(): Int

  fun bytesDownloaded(): Long

  fun totalBytesToDownload(): Long
}

fun interface AssetPackStateUpdateListener {
  fun onStateUpdate(state: AssetPackState)
}

interface AssetPackManager {
  fun getPackLocation(packName: String): AssetPackLocation?

  fun registerListener(listener: AssetPackStateUpdateListener)

  fun unregisterListener(listener: AssetPackStateUpdateListener)

  fun fetch(packNames: List<String>): Any
}

object AssetPackManagerFactory {
  lateinit var manager: AssetPackManager

  fun getInstance(context: Context): AssetPackManager = manager
}
