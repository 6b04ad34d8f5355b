// A chat with the model of a Cloister bundle, on ExecuTorch's stock TextRunner.
//
// The runner gives pieces of text and no tokens. It makes an NSString of each token's bytes, so a
// character that is split over tokens is lost (pytorch/executorch 16219): such a piece arrives
// empty, and U+FFFD is put in its place. What the model has not read yet is sent again as text
// with the next turn: the last piece of an answer that was cut, and what ends an answer.
import CryptoKit
import ExecuTorchLLM
import Foundation
import os

public enum ChatError: Error, Equatable, LocalizedError {
  case fileMissing(String)
  case fileDiffers(String)
  case tooLittleMemory(neededMB: Int, availableMB: Int)
  case cannotLoad
  case checkFailed
  case noSystemPrompt
  case specialToken
  case temperature
  case askedTwice
  case closed
  case failed(code: Int)

  /// What to do; never what a user typed.
  public var errorDescription: String? {
    let name = CloisterBundle.name
    switch self {
    case .fileMissing(let file): return "\(file) is not there; install or fetch it again."
    case .fileDiffers(let file):
      return "\(file) is not the file of the bundle; install or fetch it again."
    case .tooLittleMemory(let needed, let available):
      return "\(name) takes \(needed) MB, and this app may have \(available) MB; close other apps "
        + "or use a smaller model."
    case .cannotLoad:
      return "\(name) was made with ExecuTorch \(CloisterBundle.executorch), and this app's cannot "
        + "load it; build the app with that release."
    case .checkFailed:
      return "\(name) does not answer on this device as it did when it was exported; do not use it "
        + "here, and report the device."
    case .noSystemPrompt: return "\(name) takes no system prompt; leave it out."
    case .specialToken: return "The text spells a control token or has a NUL; leave it out."
    case .temperature: return "The temperature is not within 0 and 1; change it."
    case .askedTwice: return "An answer is being made; wait for it, or stop it."
    case .closed: return "This chat is closed; open another."
    case .failed(let code):
      return "\(name) could not answer (\(code)); the conversation begins anew, so ask again."
    }
  }
}

/// How an answer came to its end.
public enum Ending: Sendable { case ended, stopped, limit, contextFull }

public struct Answer: Sendable {
  public let text: String
  public let ending: Ending
  /// Pieces that held a part of a character, each now U+FFFD.
  public let lost: Int
}

/// What a stream of `say` gives: pieces, then the answer.
public enum ChatEvent: Sendable {
  case piece(String)
  case answer(Answer)
}

public struct ChatProgress: Sendable {
  public enum Step: Sendable { case fetching, hashing, loading, checking, ready }
  public let step: Step
  /// Of the step, 0 to 1.
  public let done: Double
}

public final class CloisterChat: @unchecked Sendable {
  private struct State {
    var unread = ""  // text that the model reads before what is said next
    var answering = false
    var stopping = false
    var full = false
    var closed = false
  }

  private let state = OSAllocatedUnfairLock(initialState: State())
  private let queue = DispatchQueue(label: "cloister.chat", qos: .userInitiated)
  private let runner: TextRunner
  private let files: ModelFiles
  private let opening: String
  private var observer: NSObjectProtocol?

  private init(_ files: ModelFiles, system: String?) throws {
    let format = CloisterBundle.format
    if let system {
      try refuse(system)
      guard let around = format.system else { throw ChatError.noSystemPrompt }
      opening = around.before + trimmed(system) + around.after
    } else {
      opening = format.begin
    }
    self.files = files
    runner = TextRunner(modelPath: files.program.path, tokenizerPath: files.tokenizer.path)
    state.withLock { $0.unread = opening }
    observer = NotificationCenter.default.addObserver(
      forName: Notification.Name("UIApplicationDidEnterBackgroundNotification"), object: nil,
      queue: nil
    ) { [weak self] _ in self?.stop() }
  }

  deinit {
    if let observer { NotificationCenter.default.removeObserver(observer) }
  }

  /// Checks the files, then the memory, loads, and at the first start compares the model's answers
  /// with those in the bundle. Throws a `ChatError` that names what is wrong.
  public static func open(
    _ files: ModelFiles, system: String? = nil,
    progress: @escaping @Sendable (ChatProgress) -> Void = { _ in }
  ) async throws -> CloisterChat {
    let chat = try CloisterChat(files, system: system)
    try await chat.onQueue {
      try preflight()
      try verify(CloisterBundle.tokenizer, at: files.tokenizer) { _ in }
      try verify(CloisterBundle.program, at: files.program) {
        progress(ChatProgress(step: .hashing, done: $0))
      }
      progress(ChatProgress(step: .loading, done: 0))
      do { try chat.runner.load() } catch { throw ChatError.cannotLoad }
      try chat.check(progress)
      progress(ChatProgress(step: .ready, done: 1))
    }
    return chat
  }

  /// Asks, and streams the answer's pieces and then the answer; a loop that is left stops it. Once
  /// the context is full, every answer is that result until `reset`.
  public func say(
    _ text: String, limit: Int = .max, temperature: Double = 0
  ) -> AsyncThrowingStream<ChatEvent, Error> {
    AsyncThrowingStream { continuation in
      let prompt: String
      do {
        try refuse(text)
        guard 0...1 ~= temperature else { throw ChatError.temperature }
        let format = CloisterBundle.format
        let said = format.user.before + trimmed(text) + format.user.after + format.answer
        prompt = try state.withLock { now in
          if now.closed { throw ChatError.closed }
          if now.answering { throw ChatError.askedTwice }
          now.answering = true
          now.stopping = false
          return now.unread + said
        }
      } catch {
        continuation.finish(throwing: error)
        return
      }
      continuation.onTermination = { [weak self] reason in
        if case .cancelled = reason { self?.stop() }
      }
      queue.async { [self] in
        do {
          let answer = try turn(prompt, max(1, limit), temperature, continuation)
          state.withLock { $0.answering = false }
          continuation.yield(.answer(answer))
          continuation.finish()
        } catch {
          state.withLock { $0.answering = false }
          continuation.finish(throwing: error)
        }
      }
    }
  }

  /// Ends the answer in progress after the piece that is being made.
  public func stop() {
    let answering = state.withLock { now in
      now.stopping = now.answering
      return now.answering
    }
    if answering { runner.stop() }  // unheard while the prompt is read: each piece repeats it
  }

  /// Begins a new conversation.
  public func reset() throws {
    try state.withLock { now in
      if now.closed { throw ChatError.closed }
      if now.answering { throw ChatError.askedTwice }
      now.unread = opening
      now.full = false
      runner.reset()
    }
  }

  /// Stops, and refuses what is said from now on. The model is freed with the last reference.
  public func close() {
    stop()
    state.withLock { $0.closed = true }
  }

  private func turn(
    _ prompt: String, _ limit: Int, _ temperature: Double,
    _ stream: AsyncThrowingStream<ChatEvent, Error>.Continuation
  ) throws -> Answer {
    if state.withLock({ $0.full }) { return Answer(text: "", ending: .contextFull, lost: 0) }
    let (pieces, full) = try generate(prompt, limit, temperature) { stream.yield(.piece($0)) }
    let end = pieces.firstIndex(where: isEnd)
    let kept = Array(pieces[..<(end ?? pieces.count)])
    let after = CloisterBundle.format.assistant.after
    let stopped = state.withLock { now in
      now.full = full
      if let end {  // one that is not the last was read by the model
        let read = end < pieces.count - 1 && after.hasPrefix(pieces[end])
        now.unread = read ? String(after.dropFirst(pieces[end].count)) : after
      } else {
        now.unread = (kept.last == lost ? "" : kept.last ?? "") + after
      }
      return now.stopping
    }
    if end == nil && !stopped && pieces.count < limit { state.withLock { $0.full = true } }
    return Answer(
      text: kept.joined(),
      ending: end != nil ? .ended : full ? .contextFull : stopped ? .stopped
        : pieces.count < limit ? .contextFull : .limit,
      lost: kept.filter { $0 == lost }.count)
  }

  /// Returns every piece, and whether the context came to its end.
  private func generate(
    _ prompt: String, _ limit: Int, _ temperature: Double, _ piece: (String) -> Void
  ) throws -> ([String], Bool) {
    var pieces: [String] = []
    let config = Config {
      $0.isEchoEnabled = false
      $0.temperature = temperature
      $0.maximumNewTokens = limit < CloisterBundle.context ? limit : -1
    }
    do {
      try withoutActuallyEscaping(piece) { piece in
        try runner.generate(prompt, config) { [self] token in
          // The runner takes its first token for text even where it ends the answer, and goes on.
          let ended = pieces.first.map(isEnd) ?? false
          if ended || state.withLock({ $0.stopping }) { runner.stop() }
          let text = token.isEmpty ? lost : token
          pieces.append(text)
          if !ended && !isEnd(text) { piece(text) }
        }
      }
    } catch {  // not passed on: it may quote the prompt
      let code = (error as NSError).code
      if code == contextEnd { return (pieces, true) }
      runner.reset()
      state.withLock { $0.unread = opening }
      throw ChatError.failed(code: code)
    }
    return (pieces, false)
  }

  private func check(_ progress: (ChatProgress) -> Void) throws {
    let caches = try FileManager.default.url(
      for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
    let mark = caches.appendingPathComponent("cloister-checked-\(CloisterBundle.program.sha256)")
    if FileManager.default.fileExists(atPath: mark.path) { return }
    for (place, check) in CloisterBundle.checks.enumerated() {
      progress(
        ChatProgress(step: .checking, done: Double(place) / Double(CloisterBundle.checks.count)))
      runner.reset()
      let (pieces, _) = try generate(check.prompt, check.tokens, 0) { _ in }
      let heard = pieces.filter { !isEnd($0) }.joined()
      let pattern = NSRegularExpression.escapedPattern(for: heard).replacingOccurrences(
        of: "\(lost)+", with: "[\\\\s\\\\S]+", options: .regularExpression)
      if check.answer.range(of: "\\A\(pattern)\\z", options: .regularExpression) == nil {
        throw ChatError.checkFailed
      }
    }
    runner.reset()
    try? Data().write(to: mark)  // else it is compared again next time
  }

  private func onQueue<T>(_ work: @escaping () throws -> T) async throws -> T {
    try await withCheckedThrowingContinuation { waiting in
      queue.async { waiting.resume(with: Result(catching: work)) }
    }
  }
}

private let lost = "\u{FFFD}"
private let contextEnd = 18  // Error::InvalidArgument, of runner and KV cache alike

private func trimmed(_ text: String) -> String {
  CloisterBundle.format.strip ? text.trimmingCharacters(in: .whitespacesAndNewlines) : text
}

private func isEnd(_ piece: String) -> Bool { CloisterBundle.ends.contains(piece) }

/// By bytes, as the tokenizer compares: to Swift, a token and an accent after it are another text.
/// The runner takes a NUL for the end of the prompt.
private func refuse(_ text: String) throws {
  let bytes = Data(text.utf8)
  if bytes.contains(0) { throw ChatError.specialToken }
  for token in CloisterBundle.special + CloisterBundle.ends
  where bytes.range(of: Data(token.utf8)) != nil {
    throw ChatError.specialToken
  }
}

private func preflight() throws {
  let available = os_proc_available_memory()  // 0 in a simulator
  if available > 0 && available < CloisterBundle.memoryBytes {
    throw ChatError.tooLittleMemory(
      neededMB: CloisterBundle.memoryBytes / 1_000_000, availableMB: available / 1_000_000)
  }
}

private func verify(_ file: ModelFile, at url: URL, progress: (Double) -> Void) throws {
  guard let handle = try? FileHandle(forReadingFrom: url) else {
    throw ChatError.fileMissing(file.name)
  }
  defer { try? handle.close() }
  var hash = SHA256()
  var read = 0
  while try autoreleasepool(invoking: {  // else all blocks stay until the end
    guard let block = try handle.read(upToCount: 1 << 22), !block.isEmpty else { return false }
    hash.update(data: block)
    read += block.count
    progress(Double(read) / Double(max(1, file.sizeBytes)))
    return true
  }) {}
  if hash.finalize().map({ String(format: "%02x", $0) }).joined() != file.sha256 {
    throw ChatError.fileDiffers(file.name)
  }
}
