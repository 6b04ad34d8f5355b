// What the app's build.gradle.kts needs for the glue; add it to yours.
// The plugin com.android.application must be 8.5.1 or later, which aligns libraries to 16 KB pages.
val executorch = "1.4.1"  // the release that the model is for, and no other

android {
    compileSdk = 35
    defaultConfig {
        minSdk = 23
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        buildConfigField("String", "EXECUTORCH", "\"$executorch\"")
    }
    buildFeatures { buildConfig = true }

    // Either the model is a pack, and settings.gradle.kts has include(":model") ...
    assetPacks += listOf(":model")
    // ... or it is among the app's assets, and is copied out of them at the first start:
    // sourceSets["main"].assets.srcDir("../model/src/main/assets")
    // androidResources { noCompress += "pte" }
}

dependencies {
    implementation("org.pytorch:executorch-android") { version { strictly(executorch) } }
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.8.0")
    implementation("com.google.android.play:asset-delivery:2.3.0")  // for AssetPack.kt only
}
