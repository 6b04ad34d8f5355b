// A chat with a model on the device, on ExecuTorch's stock runner (LlmModule 1.4.1).
//
//     val chat = Chat.open(MODEL, directory, device())
//     chat.say("Is it cold?").collect { part -> if (part is Piece) show(part.text) }
package cloister

import java.io.Closeable
import java.io.File
import java.security.MessageDigest
import java.util.concurrent.atomic.AtomicBoolean
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.channelFlow
import kotlinx.coroutines.isActive
import kotlinx.coroutines.withContext
import org.pytorch.executorch.ExecutorchRuntimeException
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

// What must be known of a model; Model.kt says it of this one.
data class ModelFile(val name: String, val sha256: String, val bytes: Long)
data class Around(val before: String, val after: String)
data class Check(val prompt: String, val answer: String, val tokens: Int)

/** `system` is null where the model takes no system prompt. */
data class PromptFormat(
    val begin: String, val system: Around?, val user: Around, val assistant: Around,
    val answer: String, val strip: Boolean)

data class Model(
    val name: String, val executorch: String, val program: ModelFile, val tokenizer: ModelFile,
    val context: Int, val memoryBytes: Long, val format: PromptFormat, val ends: List<String>,
    val special: List<String>, val checks: List<Check>)

/** What the model meets: see `device()` in ModelFiles.kt. `state` is a directory of the app. */
data class Device(val executorch: String, val freeBytes: Long, val state: File)

/** Why something was refused, by name; no message holds what a user wrote. */
sealed class Refused(message: String) : Exception(message)
class FileMissing(name: String) : Refused("$name is not on the device; copy it again.")
class FileDiffers(name: String) : Refused("$name is not the file of this release; copy it again.")
class ReleaseDiffers(made: String, found: String) : Refused(
    "The model is for ExecuTorch $made and the app has $found; pin $made or export it again.")
class NotEnoughMemory(needed: Long, free: Long) : Refused(
    "The model takes $needed bytes of memory and $free are free; close other apps.")
class AnswerDiffers(check: Int) : Refused(
    "The model answers check $check in another way on this device; do not use it here.")
class SpecialToken : Refused("The text spells a control token of the model; write it another way.")
class NoSystemPrompt : Refused("This model takes no system prompt; open the chat without one.")
class OutOfRange(what: String, from: Number, to: Number) : Refused(
    "The $what must be from $from to $to; give another.")
class PromptTooLong(context: Int) : Refused("The text does not fit $context tokens; shorten it.")
class Busy : Refused("An answer is being written; wait for its end or stop it.")
class Closed : Refused("The chat is closed; open another.")
class RunnerFailed(doing: String, code: Int) : Refused(
    "ExecuTorch failed to $doing (code $code); close the chat and open it again.")

enum class Stage { COPY, HASH, LOAD, CHECK }

/** Is told how far a stage of the first run is, from 0 to 1; not on the main thread. */
fun interface Progress { fun at(stage: Stage, fraction: Float) }

/** What `say` streams: pieces, which are whole characters, and at last how the answer ended. */
sealed interface Part
data class Piece(val text: String) : Part
data class Finished(val end: End) : Part

/** CONTEXT_FULL: what was said does not fit the model's context any more; `reset` begins anew. */
enum class End { ENDED, STOPPED, LIMIT, CONTEXT_FULL }

/** A conversation. One answer at a time; `stop`, `reset` and `close` may come from any thread. */
class Chat private constructor(
    private val model: Model, private val runner: LlmModule, private val system: String?,
    private val temperature: Float,
) : Closeable {
    private val busy = AtomicBoolean(false)
    @Volatile private var stopping = false
    @Volatile private var closed = false
    private var said = opening()
    private var read = UNKNOWN  // characters of `said` that the runner's KV cache holds
    private var position = 0  // tokens that it holds

    /** Streams the answer to `text`, of at most `limit` pieces; who stops collecting stops it. */
    fun say(text: String, limit: Int = 256): Flow<Part> = channelFlow {
        if (limit < 1) throw OutOfRange("limit", 1, model.context)
        refuseSpecial(model, text)
        enter()
        try {
            val finished = withContext(Dispatchers.IO) {
                turn(text, Answer(model.ends, limit, { stopping || !isActive }, runner::stop) {
                    trySend(Piece(it))
                })
            }
            send(finished)
        } finally {
            leave()
        }
    }.buffer(Channel.UNLIMITED)

    /** Stops the answer that is being written, at its next token; call it in `onStop`. */
    fun stop() = synchronized(runner) {
        stopping = true
        if (!closed) runner.stop()
    }

    /** Begins a new conversation. */
    fun reset() {
        enter()
        said = opening()
        read = UNKNOWN
        leave()
    }

    /** Lets go of the model: now, or when the answer that is being written has stopped. */
    override fun close() {
        stop()
        closed = true
        closeIfFree()
    }

    private fun enter() {
        if (!busy.compareAndSet(false, true)) throw if (closed) Closed() else Busy()
        stopping = false
        if (closed) {
            leave()
            throw Closed()
        }
    }

    private fun leave() {
        busy.set(false)
        if (closed) closeIfFree()
    }

    private fun closeIfFree() = synchronized(runner) {
        if (busy.compareAndSet(false, true)) runner.close()  // and nobody enters any more
    }

    private fun opening() = when (val around = model.format.system) {
        null -> model.format.begin
        else -> system?.let { around.before + stripped(it) + around.after } ?: model.format.begin
    }

    private fun stripped(text: String) = if (model.format.strip) text.trim() else text

    private fun turn(text: String, answer: Answer): Finished {
        if (read == UNKNOWN) {
            runner.resetContext()
            read = 0
            position = 0
        }
        val format = model.format
        val asked = said + format.user.before + stripped(text) + format.user.after + format.answer
        val prompt = asked.substring(read)
        val most = position + prompt.toByteArray().size  // a token is no shorter than a byte
        try {
            // LlmModule gives nothing after bytes that are no text; so tokens are bounded, too.
            val bound = minOf(model.context, most + TOKENS * minOf(model.context, answer.limit))
            runner.generate(prompt, bound, answer, false, temperature, 0, 0)
        } catch (error: ExecutorchRuntimeException) {  // whose message may hold the prompt
            read = UNKNOWN
            if (most + answer.pieces < model.context) throw RunnerFailed("answer", error.errorCode)
            if (answer.pieces == 0 && said == opening()) throw PromptTooLong(model.context)
            if (answer.pieces > 0) said = asked + answer.text + format.assistant.after
            return Finished(End.CONTEXT_FULL)
        }
        position += answer.promptTokens + answer.readTokens
        said = asked + answer.text + format.assistant.after
        // The last token was never read by the model: it begins the next prompt, unless it ended
        // the answer. Where it is only a part of the last piece, all is read again.
        read = if (answer.isExact && said.startsWith(answer.read, asked.length)) {
            asked.length + answer.read.length
        } else {
            UNKNOWN
        }
        return Finished(answer.end ?: when {
            stopping -> End.STOPPED
            position + 1 >= model.context -> End.CONTEXT_FULL
            answer.readTokens < answer.limit -> End.ENDED
            else -> End.LIMIT
        })
    }

    companion object {
        private const val UNKNOWN = -1
        private const val TOKENS = 4  // of a character, at most: it has no more bytes

        /** Loads the model whose files are in `directory`, or refuses by name.
         *
         * Every start hashes the files; the first one also asks for answers that are known.
         */
        suspend fun open(
            model: Model, directory: File, device: Device, system: String? = null,
            temperature: Float = 0f, progress: Progress = Progress { _, _ -> },
        ): Chat = withContext(Dispatchers.IO) {
            if (temperature !in 0f..1f) throw OutOfRange("temperature", 0, 1)
            if (device.executorch != model.executorch) {
                throw ReleaseDiffers(model.executorch, device.executorch)
            }
            if (system != null && model.format.system == null) throw NoSystemPrompt()
            refuseSpecial(model, system.orEmpty())
            if (device.freeBytes < model.memoryBytes) {
                throw NotEnoughMemory(model.memoryBytes, device.freeBytes)
            }
            val (program, tokenizer) = listOf(model.program, model.tokenizer).map { file ->
                verify(File(directory, file.name), file) {
                    ensureActive()
                    progress.at(Stage.HASH, it)
                }
            }
            progress.at(Stage.LOAD, 0f)
            val runner = failing("load the model") {
                LlmModule(program.path, tokenizer.path, temperature)
            }
            try {
                failing("load the model", runner::load)
                progress.at(Stage.LOAD, 1f)
                check(model, runner, device.state, progress)
            } catch (refused: Throwable) {
                runner.close()
                throw refused
            }
            Chat(model, runner, system, temperature)
        }

        private fun check(model: Model, runner: LlmModule, state: File, progress: Progress) {
            val passed = File(state, "checked-${model.executorch}-${model.program.sha256.take(16)}")
            if (passed.exists()) return
            model.checks.forEachIndexed { number, check ->
                progress.at(Stage.CHECK, number.toFloat() / model.checks.size)
                val answer = Answer(model.ends, check.tokens, { false }, runner::stop) {}
                failing("answer a check") {
                    runner.generate(check.prompt, model.context, answer, false, 0f, 0, 0)
                }
                runner.resetContext()
                val text = answer.text.toString()
                // Pieces are counted, and one piece may be several tokens.
                val same = if (answer.readTokens < check.tokens) text == check.answer
                           else text.startsWith(check.answer)
                if (!same) throw AnswerDiffers(number)
            }
            progress.at(Stage.CHECK, 1f)
            passed.createNewFile()
        }

        private fun refuseSpecial(model: Model, text: String) {
            if (model.special.any { it in text }) throw SpecialToken()
        }

        private fun <T> failing(doing: String, action: () -> T): T = try {
            action()
        } catch (error: ExecutorchRuntimeException) {
            throw RunnerFailed(doing, error.errorCode)
        }
    }
}

/** Collects an answer. LlmModule joins the tokens of a character, so a piece may be several. */
private class Answer(
    private val ends: List<String>, val limit: Int, private val isStopped: () -> Boolean,
    private val stop: () -> Unit, private val show: (String) -> Unit,
) : LlmCallback {
    val text = StringBuilder()
    val read = StringBuilder()  // what the model has read of its own answer: all but the last token
    var end: End? = null
    var pieces = 0
    var promptTokens = 0
    var readTokens = 0
    val isExact get() = last in ends || pieces == readTokens + 1
    private var last = ""

    override fun onResult(result: String) {
        pieces++
        read.append(last)
        last = result
        if (end == null) {
            if (result in ends) {
                end = End.ENDED
            } else {
                text.append(result)
                show(result)
                if (isStopped()) end = End.STOPPED else if (pieces == limit) end = End.LIMIT
            }
        }
        // At every piece: the runner forgets a stop, and overlooks an end, at an answer's first.
        if (end != null) stop()
    }

    override fun onStats(stats: String) {
        fun count(name: String) = Regex("\"$name\":(\\d+)").find(stats)!!.groupValues[1].toInt()
        promptTokens = count("prompt_tokens")
        readTokens = count("generated_tokens")  // without the first, so without the one not read
    }
}

/** Returns `path`, or refuses it by name unless it is `file`. */
internal fun verify(path: File, file: ModelFile, progress: (Float) -> Unit): File {
    if (!path.isFile) throw FileMissing(file.name)
    if (path.length() != file.bytes) throw FileDiffers(file.name)
    val digest = MessageDigest.getInstance("SHA-256")
    path.inputStream().use { input ->
        val block = ByteArray(1 shl 20)
        var done = 0L
        while (true) {
            val count = input.read(block)
            if (count < 0) break
            digest.update(block, 0, count)
            done += count
            progress(done.toFloat() / file.bytes)
        }
    }
    if (digest.hex() != file.sha256) throw FileDiffers(file.name)
    return path
}

internal fun MessageDigest.hex() = digest().joinToString("") { "%02x".format(it) }
