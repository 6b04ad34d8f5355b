// What the glue catches of org.pytorch:executorch-android 1.4.1.
package org.pytorch.executorch

open class ExecutorchRuntimeException(val errorCode: Int, details: String?) :
    RuntimeException("[ExecuTorch Error 0x${Integer.toHexString(errorCode)}] $details")
