// Where the model's files are: in the app, fetched on demand by the App Store, or picked.
import Foundation

/// What must be known of a bundle; `CloisterBundle.swift` has the values.
public struct ModelFile: Sendable {
  public let name: String
  public let sha256: String
  public let sizeBytes: Int
}

public struct Around: Sendable {
  public let before: String
  public let after: String
}

/// `begin`, unless the first message is the system's; each text between its strings; `answer`.
public struct PromptFormat: Sendable {
  public let begin: String
  public let system: Around?
  public let user: Around
  public let assistant: Around
  public let answer: String
  public let strip: Bool
}

public struct Check: Sendable {
  public let prompt: String
  public let answer: String
  public let tokens: Int
}

public struct ModelFiles {
  public let program: URL
  public let tokenizer: URL
  private let access: NSBundleResourceRequest?  // the system may delete the files once it is gone

  /// The files of a directory.
  public init(in directory: URL) {
    self.init(in: directory, access: nil)
  }

  private init(in directory: URL, access: NSBundleResourceRequest?) {
    program = directory.appendingPathComponent(CloisterBundle.program.name)
    tokenizer = directory.appendingPathComponent(CloisterBundle.tokenizer.name)
    self.access = access
  }

  /// The folder `model` that was added to the app as a folder reference.
  public static func bundled() throws -> ModelFiles {
    ModelFiles(in: try folder())
  }

  /// The same folder, tagged for On-Demand Resources: the App Store sends it at the first start.
  public static func onDemand(
    tag: String = "cloister-model", progress: @escaping @Sendable (ChatProgress) -> Void = { _ in }
  ) async throws -> ModelFiles {
    let request = NSBundleResourceRequest(tags: [tag])
    request.loadingPriority = NSBundleResourceRequestLoadingPriorityUrgent
    let watch = request.progress.observe(\.fractionCompleted) { found, _ in
      progress(ChatProgress(step: .fetching, done: found.fractionCompleted))
    }
    defer { watch.invalidate() }
    try await request.beginAccessingResources()
    return ModelFiles(in: try folder(), access: request)
  }

  /// A folder that the user picked, such as by `fileImporter`: copied into the app, once.
  public static func picked(_ folder: URL) throws -> ModelFiles {
    let granted = folder.startAccessingSecurityScopedResource()
    defer { if granted { folder.stopAccessingSecurityScopedResource() } }
    let manager = FileManager.default
    var home = try manager.url(
      for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true
    ).appendingPathComponent("cloister-\(CloisterBundle.program.sha256.prefix(16))")
    try manager.createDirectory(at: home, withIntermediateDirectories: true)
    var values = URLResourceValues()
    values.isExcludedFromBackup = true  // a model is large, and can be picked again
    try home.setResourceValues(values)
    for file in [CloisterBundle.program, CloisterBundle.tokenizer] {
      let target = home.appendingPathComponent(file.name)
      let size = try? target.resourceValues(forKeys: [.fileSizeKey]).fileSize
      if size == file.sizeBytes { continue }  // a copy that was cut short has another size
      try? manager.removeItem(at: target)
      do {
        try manager.copyItem(at: folder.appendingPathComponent(file.name), to: target)
      } catch {
        throw ChatError.fileMissing(file.name)
      }
    }
    return ModelFiles(in: home)
  }

  private static func folder() throws -> URL {
    guard let found = Bundle.main.url(forResource: "model", withExtension: nil) else {
      throw ChatError.fileMissing("model")
    }
    return found
  }
}
