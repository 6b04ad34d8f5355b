/** Where the model's files are, their hashes, and which model has been checked on this device. */
import ReactNativeBlobUtil from 'react-native-blob-util';
import { Platform } from 'react-native';
import type { LLMModel } from 'react-native-executorch';

import { BUNDLE } from './bundle';
import type { Progress } from './chat';

const { fs } = ReactNativeBlobUtil;

/** Paths, as the native runner opens them. */
export type Files = { readonly program: string; readonly tokenizer: string };

/** The files of a directory, such as one that the app fetched to or a user picked. */
export function filesIn(directory: string): Files {
  const inside = (name: string) => `${directory.replace(/^file:\/\//, '')}/${name}`;
  return { program: inside(BUNDLE.program.name), tokenizer: inside(BUNDLE.tokenizer.name) };
}

/**
 * The files that the app was built with: the folder `model` among the resources of an iOS app, or
 * among the assets of an Android app, which are copied out since the runner opens paths.
 */
export async function bundledFiles(onProgress?: (progress: Progress) => void): Promise<Files> {
  if (Platform.OS !== 'android') return filesIn(`${fs.dirs.MainBundleDir}/model`);
  const directory = `${fs.dirs.DocumentDir}/cloister-${BUNDLE.program.sha256.slice(0, 16)}`;
  if (!(await fs.isDir(directory))) await fs.mkdir(directory);
  for (const [place, file] of [BUNDLE.program, BUNDLE.tokenizer].entries()) {
    onProgress?.({ step: 'copying', done: place / 2 });
    const target = `${directory}/${file.name}`;
    // A copy that was cut short has another size; one of another content fails its hash.
    if ((await fs.exists(target)) && Number((await fs.stat(target)).size) === file.sizeBytes) continue;
    await fs.cp(fs.asset(`model/${file.name}`), target);
  }
  return filesIn(directory);
}

/** The same files for the package's own `useLLMChatSession`, which lays prompts out by Jinja. */
export function sessionModel(files: Files): LLMModel {
  return {
    modelPath: files.program,
    tokenizerPath: files.tokenizer,
    tokenizerConfigPath: files.tokenizer.replace(/tokenizer\.json$/, 'tokenizer_config.json'),
  };
}

/** The sha256 of a file, or undefined where there is none. */
export async function sha256(path: string): Promise<string | undefined> {
  return (await fs.exists(path)) ? fs.hash(path, 'sha256') : undefined;
}

/** Hashes of the programs whose answers were compared on this device. */
export const checked = {
  has: (hash: string): Promise<boolean> => fs.exists(mark(hash)),
  async add(hash: string): Promise<void> { // where it fails, they are compared again next time
    await fs.writeFile(mark(hash), '1', 'utf8').catch(() => undefined);
  },
};
const mark = (hash: string) => `${fs.dirs.CacheDir}/cloister-checked-${hash}`;
