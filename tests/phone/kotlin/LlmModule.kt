// A stand-in for LlmModule of org.pytorch:executorch-android 1.4.1: the same signatures, and behind
// them the stock C++ runner in another process (tests/phone/runner.py). What the JNI layer does is
// done here: pieces are joined until they are whole characters, and a stop holds from the next
// piece on (extension/android/jni/jni_layer_llama.cpp).
package org.pytorch.executorch.extension.llm

import java.io.ByteArrayOutputStream
import java.io.Closeable
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.util.Base64
import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock
import org.pytorch.executorch.ExecutorchRuntimeException

interface LlmCallback {
  fun onResult(result: String)

  fun onStats(stats: String) {}

  fun onError(errorCode: Int, message: String) {}
}

class LlmModule(modulePath: String, tokenizerPath: String, private val temperature: Float) :
    Closeable {
  private val lock = ReentrantLock()
  private val id: String
  private val read = ByteArrayOutputStream()  // what lies in the KV cache, as text
  @Volatile private var stopping = false
  @Volatile private var destroyed = false

  init {
    Runner.say("new", encode(modulePath), encode(tokenizerPath))
    id = Runner.hear().let { if (it[0] == "made") it[1] else throw failure(it[1]) }
  }

  fun load() = checked {}

  fun generate(prompt: String, llmCallback: LlmCallback) =
      generate(prompt, 128, llmCallback, true, -1.0f, 0, 0)

  fun generate(
      prompt: String,
      seqLen: Int,
      llmCallback: LlmCallback,
      echo: Boolean,
      temperature: Float,
      numBos: Int,
      numEos: Int,
  ) = checked {
    prompts += prompt
    val heat = if (temperature >= 0) temperature else this.temperature
    Runner.say("generate", id, encode(prompt), "$seqLen", "$echo", "$heat")
    read.write(prompt.toByteArray())
    lastRead = read.toString(Charsets.UTF_8)
    var bytes = ByteArray(0)
    var token = ByteArray(0)  // the last, which the model has not read
    stopping = false
    while (true) {
      val words = Runner.hear()
      when (words[0]) {
        "piece" -> {
          read.write(token)
          token = Base64.getDecoder().decode(words.getOrElse(1) { "" })
          bytes += token
          decode(bytes)?.let {
            bytes = ByteArray(0)
            beforePiece()
            llmCallback.onResult(it)
          }
          Runner.say(if (stopping) "stop" else "go")
          stopping = false
        }
        "done" -> {
          llmCallback.onStats(
              "{\"prompt_tokens\":${words[1]},\"generated_tokens\":${words[2]}}")
          return@checked
        }
        else -> {
          llmCallback.onError(INVALID_ARGUMENT, "generate() failed with error code 18")
          throw failure(words[1])
        }
      }
    }
  }

  fun resetContext() = checked {
    read.reset()
    Runner.say("reset", id)
  }

  fun stop() {
    if (!destroyed) stopping = true
  }

  override fun close() {
    check(lock.tryLock()) { "Cannot close module while method is executing" }
    try {
      check(lock.holdCount == 1) { "Cannot close module from within a callback during execution" }
      if (destroyed) return
      destroyed = true
      closed++
      Runner.say("close", id)
    } finally {
      lock.unlock()
    }
  }

  private fun checked(action: () -> Unit) = lock.withLock {
    check(lock.holdCount == 1) { "Cannot call LlmModule methods from within a callback" }
    check(!destroyed) { "LlmModule has been destroyed" }
    action()
  }

  companion object {
    const val INVALID_ARGUMENT = 0x12

    // For trials: what was asked, all that was read before the last answer, how many modules were
    // closed, and what happens before a piece.
    val prompts = mutableListOf<String>()
    @Volatile var lastRead = ""
    @Volatile var closed = 0
    @Volatile var beforePiece: () -> Unit = {}

    private fun encode(text: String) = Base64.getEncoder().encodeToString(text.toByteArray())

    /** As on a phone: with the end of the native log, in which the prompt may stand. */
    private fun failure(text: String) = ExecutorchRuntimeException(
        INVALID_ARGUMENT, "Failed | nativeLog=" + String(Base64.getDecoder().decode(text)))

    private fun decode(bytes: ByteArray): String? = try {
      Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString()
    } catch (_: CharacterCodingException) {
      null
    }
  }
}

/** The process with the stock runner. */
object Runner {
  private val process = ProcessBuilder(System.getProperty("runner").split(" "))
      .redirectError(ProcessBuilder.Redirect.DISCARD).start()
  private val says = process.outputStream.bufferedWriter()
  private val hears = process.inputStream.bufferedReader()

  fun say(vararg words: String) {
    says.write(words.joinToString(" ") + "\n")
    says.flush()
  }

  fun hear(): List<String> = hears.readLine()?.split(" ") ?: error("The runner's process ended.")

  fun end() {
    says.close()
    process.waitFor()
  }
}
