// What the glue takes of com.google.android.play:asset-delivery 2.3.0.
package com.google.android.play.core.assetpacks.model

object AssetPackStatus {
  const val DOWNLOADING = 2
  const val COMPLETED = 4
  const val FAILED = 5
  const val CANCELED = 6
  const val REQUIRES_USER_CONFIRMATION = 9
}
