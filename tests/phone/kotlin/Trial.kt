// Tries the glue on the JVM; prints `SCENARIO NAME VALUE` a line, the value in Base64.
package cloister

import android.content.Context
import android.net.Uri
import com.google.android.play.core.assetpacks.*
import com.google.android.play.core.assetpacks.model.AssetPackStatus
import java.io.File
import java.util.Base64
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import kotlinx.coroutines.*
import kotlinx.coroutines.flow.*
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule
import org.pytorch.executorch.extension.llm.Runner

private val directory = File(System.getProperty("model"))
private val split = File(System.getProperty("split"))
private val scratch = File(System.getProperty("scratch"))
private val ask = System.getProperty("ask")  // what a golden row asks
private val task: String? = System.getProperty("system")
private val isShort = System.getProperty("short") == "true"  // fills no context
private const val LIMIT = 64
private var scenario = ""

private fun note(name: String, value: Any?) = println(
    "$scenario $name " + Base64.getEncoder().encodeToString(value.toString().toByteArray()))

/** The name and words of what is thrown, which must not hold what was asked. */
private suspend fun refusal(action: suspend () -> Unit): String = try {
    action()
    "nothing"
} catch (refused: Refused) {
    check(refused.cause == null)
    refused::class.simpleName + ": " + refused.message
}

private fun device(name: String = scenario) = Device(
    MODEL.executorch, 1L shl 40, File(scratch, name).apply { mkdirs() })

private suspend fun open(model: Model = MODEL, from: File = directory, system: String? = task) =
    Chat.open(model, from, device(), system)

private class Said(val pieces: List<String>, val end: End?)

private suspend fun Flow<Part>.said(): Said {
    val parts = toList()
    return Said(parts.filterIsInstance<Piece>().map { it.text },
                parts.filterIsInstance<Finished>().singleOrNull()?.end)
}

private fun note(said: Said, name: String = "") {
    note("pieces$name", said.pieces.joinToString("|"))
    note("end$name", said.end)
}

/** What a fresh runner answers to a whole conversation. */
private fun direct(text: String, from: File = directory): String {
    val found = mutableListOf<String>()
    LlmModule(File(from, MODEL.program.name).path, File(from, MODEL.tokenizer.name).path, 0f).use {
        val bound = minOf(MODEL.context, text.toByteArray().size + 4 * LIMIT)
        it.generate(text, bound, object : LlmCallback {
            override fun onResult(result: String) {
                found += result
                if (found.size > LIMIT) it.stop()
            }
        }, false, 0f, 0, 0)
    }
    return found.joinToString("")
}

private fun prompts(action: () -> Unit): List<String> {
    val before = LlmModule.prompts.size
    action()
    return LlmModule.prompts.drop(before)
}

private suspend fun streams() {
    val stages = mutableListOf<String>()
    val chat = Chat.open(MODEL, directory, device(), task) { stage, part ->
        stages += "$stage $part"
    }
    note("stages", stages.map { it.substringBefore(" ") }.distinct().joinToString(" "))
    note("last", stages.last())
    val seen = CountDownLatch(1)
    var count = 0
    LlmModule.beforePiece = {
        if (++count == 2) note("streamed", seen.await(20, TimeUnit.SECONDS))
    }
    val parts = chat.say(ask, LIMIT).onEach { seen.countDown() }.toList()
    LlmModule.beforePiece = {}
    note(flowOf(*parts.toTypedArray()).said())
    note("again", prompts { runBlocking { open().close() } }.size)  // checks of a second start
    chat.close()
}

/** The turn after one that ended by `how`: what was sent, and whether it is the whole's answer. */
private suspend fun goesOn(from: File, model: Model, limit: Int) {
    val chat = open(model, from)
    val first = chat.say(ask, limit).said()
    note(first)
    lateinit var second: Said
    val sent = prompts { runBlocking { second = chat.say("Again?", LIMIT).said() } }.single()
    note("sent", sent)
    val format = model.format
    val opening = task?.let { format.system!!.before + it + format.system.after } ?: format.begin
    val whole = opening + format.user.before + ask + format.user.after + format.answer +
        first.pieces.joinToString("") + format.assistant.after + format.user.before + "Again?" +
        format.user.after + format.answer
    note("read", LlmModule.lastRead == whole)
    note("second", second.pieces.joinToString(""))
    note("whole", direct(whole, from))
    chat.close()
}

private suspend fun stops() {
    val chat = open()
    val third = CountDownLatch(1)
    val stopped = CountDownLatch(1)
    var count = 0
    LlmModule.beforePiece = {
        if (++count == 3) {
            third.countDown()
            stopped.await(20, TimeUnit.SECONDS)
        }
    }
    val parts = chat.say(ask, LIMIT).withIndex().onEach { (place, _) ->
        if (place == 1) {
            third.await(20, TimeUnit.SECONDS)  // a stop before would end the answer at the second
            chat.stop()
            stopped.countDown()
        }
    }.map { it.value }.toList()
    LlmModule.beforePiece = {}
    note(flowOf(*parts.toTypedArray()).said())
    note("taken", chat.say(ask, LIMIT).take(2).toList().size)  // who stops collecting stops it
    note("next", chat.say(ask, LIMIT).said().end)
    chat.close()
}

private suspend fun twice() = coroutineScope {
    val chat = open()
    val asked = CountDownLatch(1)
    var count = 0
    LlmModule.beforePiece = { if (++count == 2) asked.await(20, TimeUnit.SECONDS) }
    val parts = mutableListOf<Part>()
    chat.say(ask, LIMIT).collect {
        if (parts.isEmpty()) {
            note("say", refusal { chat.say("secret").collect() })
            note("reset", refusal { chat.reset() })
            asked.countDown()
        }
        parts += it
    }
    LlmModule.beforePiece = {}
    note("end", parts.last())
    chat.close()
}

private suspend fun closes() {
    val chat = open()
    val before = LlmModule.closed
    val closed = CountDownLatch(1)
    var count = 0
    var open = true
    LlmModule.beforePiece = { if (++count == 3) closed.await(20, TimeUnit.SECONDS) }
    val end = chat.say(ask, LIMIT).onEach {
        if (open) {
            open = false
            chat.close()
            chat.close()
            closed.countDown()
        }
    }.last()
    LlmModule.beforePiece = {}
    note("end", end)
    note("closed", LlmModule.closed - before)
    note("say", refusal { chat.say("secret").collect() })
}

private suspend fun fills() {
    val chat = open()
    fun cold(times: Int) = "secret" + " cold".repeat(times)
    note("first", refusal { chat.say(cold(2 * MODEL.context)).collect() })
    var most = MODEL.context
    while (true) {  // the longest text that fits: its answer does not
        try {
            note(chat.say(cold(most)).said(), "-middle")
            break
        } catch (_: PromptTooLong) {
            most--
        }
    }
    note("after", chat.say("Is it?").said().end)
    chat.reset()
    note("most", chat.say(cold(most * 9 / 10), 3).said().end)
    note(chat.say("Refused" + cold(most / 9)).said(), "-turn")
    note("short", chat.say("Is it?", 1).said().end)
    note("short-read", "Refused" in LlmModule.lastRead)
    chat.reset()
    note(chat.say(ask, LIMIT).said(), "-reset")
    chat.close()
}

private suspend fun refuses() {
    val chat = open()
    note("text", ODD.ends.single())
    note("special", refusal { chat.say("secret ${MODEL.special[0]}").collect() })
    note("limit", refusal { chat.say("secret", 0).collect() })
    chat.close()
    note("special-system", refusal { open(system = "secret ${MODEL.special[0]}") })
    val without = MODEL.copy(format = MODEL.format.copy(system = null))
    note("temperature", refusal {
        Chat.open(MODEL, directory, device(), temperature = 1.5f)
    })
    note("system", refusal { open(without, system = "secret") })
    note("release", refusal {
        Chat.open(MODEL, directory, device().copy(executorch = "1.3.0"))
    })
    note("memory", refusal { Chat.open(MODEL, directory, device().copy(freeBytes = 1000)) })
    val wrong = MODEL.copy(checks = MODEL.checks.map { it.copy(answer = it.answer + "x") })
    for (name in listOf("golden", "golden-again")) {
        note(name, refusal { Chat.open(wrong, directory, device("wrong")) })
    }
    val copy = File(scratch, "changed").apply { mkdirs() }
    for (file in listOf(MODEL.program, MODEL.tokenizer)) {
        directory.copyRecursively(copy, overwrite = true)
        val path = File(copy, file.name)
        path.writeBytes(path.readBytes().also { it[it.size / 2]++ })
        note("byte-${file.name}", refusal { open(MODEL, copy) })
    }
    File(copy, MODEL.tokenizer.name).writeBytes(ByteArray(0))
    File(copy, MODEL.program.name).delete()
    note("missing", refusal { open(MODEL, copy) })
    val junk = File(copy, MODEL.program.name).apply { writeBytes(ByteArray(5000)) }
    File(directory, MODEL.tokenizer.name).copyTo(File(copy, MODEL.tokenizer.name), true)
    val hash = java.security.MessageDigest.getInstance("SHA-256").apply { update(junk.readBytes()) }
    val other = MODEL.copy(program = ModelFile(MODEL.program.name, hash.hex(), junk.length()))
    note("junk", refusal { open(other, copy) })
}

private suspend fun copies() {
    val context = Context(directory, File(scratch, "app").apply { mkdirs() })
    File(context.noBackupFilesDir, "model-old").mkdirs()
    val stages = mutableListOf<String>()
    val copied = context.copyFromAssets(MODEL) { stage, part -> stages += "$stage $part" }
    note("stages", stages.last())
    note("old", File(context.noBackupFilesDir, "model-old").exists())
    note("free", context.device("1.4.1").freeBytes)
    Chat.open(MODEL, copied, context.device("1.4.1")).close()
    val picked = Uri(File(directory, MODEL.program.name).path)
    File(copied, MODEL.program.name).delete()
    note("wrong", refusal { context.copyPicked(MODEL, MODEL.tokenizer.copy(name = "x"), picked) })
    context.copyPicked(MODEL, MODEL.program, picked)
    note("files", copied.list()!!.sorted().joinToString(" "))
}

private class Play(private val states: List<Int>) : AssetPackManager {
    private var ready = false
    val listeners = mutableListOf<AssetPackStateUpdateListener>()
    override fun getPackLocation(packName: String) = if (!ready) null else
        object : AssetPackLocation { override fun assetsPath() = directory.path }
    override fun registerListener(listener: AssetPackStateUpdateListener) { listeners += listener }
    override fun unregisterListener(listener: AssetPackStateUpdateListener) {
        listeners -= listener
    }
    override fun fetch(packNames: List<String>) {
        for (status in states) {
            ready = status == AssetPackStatus.COMPLETED
            listeners.toList().forEach { it.onStateUpdate(object : AssetPackState {
                override fun name() = packNames.single()
                override fun status() = status
                override fun errorCode() = -6
                override fun bytesDownloaded() = 1L
                override fun totalBytesToDownload() = 4L
            }) }
        }
    }
}

private suspend fun fetches() {
    val context = Context(directory, scratch)
    var asked = 0
    val play = Play(listOf(9, 2, 4))
    AssetPackManagerFactory.manager = play
    val stages = mutableListOf<String>()
    val found = context.modelFromPack({ asked++ }) { stage, part -> stages += "$stage $part" }
    note("stages", stages.joinToString())
    note("asked", asked)
    note("left", play.listeners.size)
    Chat.open(MODEL, found, device()).close()
    AssetPackManagerFactory.manager = Play(listOf(2, 5))
    note("failed", refusal { context.modelFromPack({}) })
}

fun main() = runBlocking<Unit> {
    val halves = MODEL.copy(
        tokenizer = ModelFile(
            MODEL.tokenizer.name, System.getProperty("splitSha256"),
            File(split, MODEL.tokenizer.name).length()),
        checks = listOf())
    val scenarios = mapOf<String, suspend () -> Unit>(
        "streams" to ::streams, "stops" to ::stops, "twice" to ::twice, "closes" to ::closes,
        "fills" to ::fills, "refuses" to ::refuses, "copies" to ::copies, "fetches" to ::fetches,
        "ended" to { goesOn(directory, MODEL, LIMIT) },
        "limited" to { goesOn(directory, MODEL, 3) },
        "first" to { goesOn(directory, MODEL, 1) },
        "split" to { goesOn(split, halves, LIMIT) },
        "split-limited" to { goesOn(split, halves, 1) })
    for ((name, action) in scenarios) {
        if (isShort && name == "fills") continue
        scenario = name
        try {
            action()
        } catch (error: Exception) {
            note("error", error.stackTraceToString())
        }
    }
    Runner.end()
}
