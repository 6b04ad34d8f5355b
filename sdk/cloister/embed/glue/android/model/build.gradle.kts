// The model's files as a pack of Play Asset Delivery.
plugins { id("com.android.asset-pack") }

assetPack {
    packName.set("model")
    // "install-time" ships it with the app; then it is copied out (copyFromAssets).
    dynamicDelivery { deliveryType.set("fast-follow") }
}
