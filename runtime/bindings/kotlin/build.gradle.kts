// An Android library: jniLibs/ABI/libdmd_capi.so of runtime/capi for each ABI, and dmd_jni.c built over it.
plugins {
    id("com.android.library")
    kotlin("android")
}

android {
    namespace = "dmd.runtime"
    compileSdk = 36
    defaultConfig {
        minSdk = 26
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        externalNativeBuild { cmake { arguments += "-DANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES=ON" } }
        consumerProguardFiles("consumer-rules.pro")
    }
    externalNativeBuild { cmake { path = file("src/main/jni/CMakeLists.txt") } }
}
