/**
 * A chat with the model of a Cloister bundle, on the stock runner of react-native-executorch.
 *
 * The runner gives pieces of text and no tokens. So a character that is split over tokens arrives
 * as U+FFFD, and what the model has not read yet is sent again as text with the next turn: the
 * last piece of an answer that was cut, and what ends an assistant's message.
 */
import { getTotalMemory } from 'react-native-device-info';
import { llm, nlp, wrapAsync } from 'react-native-executorch';
import { version } from 'react-native-executorch/package.json';
import { scheduleOnRN } from 'react-native-worklets';

import { BUNDLE } from './bundle';
import { checked, type Files, sha256 } from './files';

/** What the glue must know of a bundle; `bundle.ts` has the values. */
export type Bundle = {
  readonly name: string;
  readonly executorch: string;
  readonly program: ModelFile;
  readonly tokenizer: ModelFile;
  /** Tokens. */
  readonly context: number;
  /** What loading takes: packed weights, KV buffers, activations. */
  readonly memoryBytes: number;
  readonly format: PromptFormat;
  /** Texts of the tokens that end an answer. */
  readonly ends: readonly string[];
  /** Texts that the tokenizer reads as control tokens. */
  readonly special: readonly string[];
  readonly checks: readonly Check[];
};
export type ModelFile = {
  readonly name: string;
  readonly sha256: string;
  readonly sizeBytes: number;
};
export type Around = { readonly before: string; readonly after: string };
/** `begin`, unless the first message is the system's; each text between its strings; `answer`. */
export type PromptFormat = {
  readonly begin: string;
  readonly system: Around | null;
  readonly user: Around;
  readonly assistant: Around;
  readonly answer: string;
  readonly strip: boolean;
};
export type Check = { readonly prompt: string; readonly answer: string; readonly tokens: number };

/** How an answer came to its end. */
export type Ending = 'ended' | 'stopped' | 'limit' | 'context full';
export type Answer = {
  readonly text: string;
  readonly ending: Ending;
  /** Pieces that held a part of a character, each now U+FFFD. */
  readonly lost: number;
};

/** Why a chat or an answer was refused. */
export type Reason =
  | 'other release' | 'file missing' | 'file differs' | 'too little memory' | 'cannot load'
  | 'check failed' | 'no system prompt' | 'special token' | 'temperature' | 'asked twice'
  | 'closed' | 'failed';

/** Its message never holds what a user typed. */
export class ChatError extends Error {
  constructor(readonly reason: Reason, message: string) {
    super(message);
    this.name = 'ChatError';
  }
}

export type Progress = {
  readonly step: 'copying' | 'hashing' | 'loading' | 'checking' | 'ready';
  /** Of the step, 0 to 1. */
  readonly done: number;
};
export type Options = {
  readonly system?: string | undefined;
  readonly onProgress?: ((progress: Progress) => void) | undefined;
};
export type Ask = { readonly limit?: number; readonly temperature?: number };

const RELEASE = '0.10.2';
const LOST = '\ufffd';
// A system ends an app long before it has taken all of the device's memory.
const SHARE = 0.5;

/** Runs on the thread of worklets, which the native call blocks; returns every piece. */
function generate(
  runner: llm.LLMRunner, prompt: string, config: llm.LLMGenerationConfig,
  ends: readonly string[], onPiece: (piece: string) => void,
): string[] {
  'worklet';
  const pieces: string[] = [];
  runner.generate(prompt, config, (piece) => {
    // The runner takes its first token for text even where it ends the answer, and goes on.
    if (pieces.length > 0 && ends.includes(pieces[0]!)) runner.stop();
    pieces.push(piece);
    if (!ends.includes(pieces[0]!) && !ends.includes(piece)) scheduleOnRN(onPiece, piece);
  });
  return pieces;
}

export class Chat {
  private unread: string; // text that the model reads before what is said next
  private current: Promise<unknown> | undefined;
  private stopping = false;
  private closed = false;

  private constructor(
    private readonly runner: llm.LLMRunner, private readonly tokenizer: nlp.Tokenizer,
    private readonly system: string | undefined,
  ) {
    this.unread = this.opening();
  }

  /**
   * Checks the files, then the memory, loads, and at the first start compares the model's answers
   * with those in the bundle. Throws a ChatError that names what is wrong.
   */
  static async open(files: Files, options: Options = {}): Promise<Chat> {
    const report = (step: Progress['step'], done: number) => options.onProgress?.({ step, done });
    if (version !== RELEASE) {
      throw new ChatError('other release', `This app has react-native-executorch ${version}, and `
        + `the glue was written for ${RELEASE}; install that release.`);
    }
    if (options.system !== undefined) refuse(options.system);
    if (options.system !== undefined && BUNDLE.format.system === null) {
      throw new ChatError('no system prompt',
        `${BUNDLE.name} takes no system prompt; leave it out.`);
    }
    await preflight();
    for (const [place, file] of [BUNDLE.program, BUNDLE.tokenizer].entries()) {
      report('hashing', place / 2);
      await verify(file, place === 0 ? files.program : files.tokenizer);
    }
    report('loading', 0);
    let chat: Chat;
    try {
      const runner = await wrapAsync(llm.createLLMRunner)(files.program, files.tokenizer);
      chat = new Chat(runner, await wrapAsync(nlp.loadTokenizer)(files.tokenizer), options.system);
    } catch {
      throw new ChatError('cannot load', `${BUNDLE.name} was made with ExecuTorch `
        + `${BUNDLE.executorch}, and this app's cannot load it; export it again for this release.`);
    }
    try {
      if (!(await checked.has(BUNDLE.program.sha256))) await chat.check(report);
      await checked.add(BUNDLE.program.sha256);
    } catch (error) {
      await chat.close();
      throw error;
    }
    report('ready', 1);
    return chat;
  }

  /** Asks, streams the answer's pieces to `onPiece`, and resolves to the whole and how it ended. */
  async say(text: string, onPiece?: (piece: string) => void, ask: Ask = {}): Promise<Answer> {
    this.free();
    refuse(text);
    const { temperature = 0 } = ask;
    if (!(temperature >= 0 && temperature <= 1)) {
      throw new ChatError('temperature', 'The temperature is not within 0 and 1; change it.');
    }
    const { user, answer, strip } = BUNDLE.format;
    const said = user.before + (strip ? text.trim() : text) + user.after;
    this.stopping = false;
    const turn = this.turn(this.unread + said + answer, onPiece, ask);
    this.current = turn;
    try {
      return await turn;
    } finally {
      this.current = undefined;
    }
  }

  /** Ends the answer in progress after the piece that is being made. */
  stop(): void {
    if (this.current === undefined) return;
    this.stopping = true;
    this.runner.stop(); // unheard while the prompt is read: each piece that comes repeats it
  }

  /** Begins a new conversation. */
  reset(): void {
    this.free();
    this.runner.reset();
    this.unread = this.opening();
  }

  /** Stops, waits for the answer in progress, and frees the model. */
  async close(): Promise<void> {
    if (this.closed) return;
    this.stop();
    this.closed = true;
    await this.current?.catch(() => undefined);
    this.runner.dispose();
    this.tokenizer.dispose();
  }

  /** `close` without waiting, as `useModel` calls it. */
  readonly dispose = (): void => void this.close();

  private opening(): string {
    const { begin, system, strip } = BUNDLE.format;
    if (this.system === undefined || system === null) return begin;
    return system.before + (strip ? this.system.trim() : this.system) + system.after;
  }

  private free(): void {
    if (this.closed) throw new ChatError('closed', 'This chat is closed; open another.');
    if (this.current !== undefined) {
      throw new ChatError('asked twice', 'An answer is being made; wait for it, or stop it.');
    }
  }

  private async turn(
    prompt: string, onPiece: ((piece: string) => void) | undefined, ask: Ask,
  ): Promise<Answer> {
    const { maxSeqLen, pos } = this.runner.getKVCacheState();
    const room = Math.min(maxSeqLen || BUNDLE.context, BUNDLE.context) - pos
      - this.tokenizer.encode(prompt).length;
    if (room < 1) return { text: '', ending: 'context full', lost: 0 };
    const wanted = Math.max(1, ask.limit ?? Infinity);
    const limit = Math.min(room, wanted);
    const pieces = await this.run(prompt, limit, ask.temperature ?? 0, (piece) => {
      if (this.stopping) this.runner.stop();
      onPiece?.(piece);
    });
    const end = pieces.findIndex((piece) => BUNDLE.ends.includes(piece));
    const kept = end < 0 ? pieces : pieces.slice(0, end);
    const last = kept.at(-1) ?? '';
    const { after } = BUNDLE.format.assistant;
    if (end < 0) this.unread = (last.includes(LOST) ? '' : last) + after;
    else if (end < pieces.length - 1 && after.startsWith(pieces[end]!)) {
      this.unread = after.slice(pieces[end]!.length); // the model has read the end
    } else this.unread = after;
    return {
      text: kept.join(''),
      ending: end >= 0 ? 'ended' : pieces.length < limit ? 'stopped'
        : wanted <= room ? 'limit' : 'context full',
      lost: kept.filter((piece) => piece.includes(LOST)).length,
    };
  }

  private async run(
    prompt: string, limit: number, temperature: number, onPiece: (piece: string) => void,
  ): Promise<string[]> {
    const config: llm.LLMGenerationConfig = { echo: false, maxNewTokens: limit, temperature };
    try {
      return await wrapAsync(generate)(this.runner, prompt, config, BUNDLE.ends, onPiece);
    } catch { // not passed on: it may quote the prompt
      this.runner.reset();
      this.unread = this.opening();
      throw new ChatError('failed',
        `${BUNDLE.name} could not answer; the conversation begins anew, so ask again.`);
    }
  }

  private async check(report: (step: 'checking', done: number) => void): Promise<void> {
    for (const [place, { prompt, answer, tokens }] of BUNDLE.checks.entries()) {
      report('checking', place / BUNDLE.checks.length);
      this.runner.reset();
      const pieces = await this.run(prompt, tokens, 0, () => undefined);
      const heard = pieces.filter((piece) => !BUNDLE.ends.includes(piece)).join('');
      const parts = heard.split(/\ufffd+/).map((part) => part.replace(/[^\w\s]/g, '\\$&'));
      if (!new RegExp(`^${parts.join('[^]+?')}$`).test(answer)) {
        throw new ChatError('check failed', `${BUNDLE.name} does not answer on this device as it `
          + 'did when it was exported; do not use it here, and report the device.');
      }
    }
    this.runner.reset();
  }
}

async function preflight(): Promise<void> {
  const mb = (bytes: number) => Math.ceil(bytes / 1e6);
  const most = SHARE * (await getTotalMemory());
  if (BUNDLE.memoryBytes > most) {
    throw new ChatError('too little memory', `${BUNDLE.name} takes ${mb(BUNDLE.memoryBytes)} MB, `
      + `and an app may have about ${mb(most)} MB of this device; use a smaller model.`);
  }
}

async function verify(file: ModelFile, path: string): Promise<void> {
  const found = await sha256(path);
  if (found === undefined) {
    throw new ChatError('file missing', `${file.name} is not there; install or fetch it again.`);
  }
  if (found !== file.sha256) {
    throw new ChatError('file differs',
      `${file.name} is not the file of the bundle; install or fetch it again.`);
  }
}

function refuse(text: string): void {
  if ([...BUNDLE.special, ...BUNDLE.ends].some((token) => text.includes(token))) {
    throw new ChatError('special token',
      'The text spells a control token of the model; leave it out.');
  }
}
