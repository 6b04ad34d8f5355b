// Stands in for the native halves of React Native and its packages. Behind the runner is
// ExecuTorch's stock one, in another process; worklets run on another thread.
const { execFileSync, spawn } = require('node:child_process');
const crypto = require('node:crypto');
const fs = require('node:fs');
const Module = require('node:module');
const path = require('node:path');
const { Worker } = require('node:worker_threads');
const { ask, listen } = require('./lines.cjs');

const [, , work, python, version] = process.argv;
const documents = path.join(work, 'documents');
fs.mkdirSync(documents, { recursive: true });
const fds = Object.fromEntries(['asks', 'says'].map((name) => {
  const pipe = path.join(work, name);
  execFileSync('mkfifo', [pipe]);
  return [name, fs.openSync(pipe, 'r+')];
}));
const server = spawn(python, [path.join(__dirname, 'runner.py')], {
  stdio: [fds.asks, fds.says, fs.openSync(path.join(work, 'log'), 'w')] });
server.on('exit', (code, signal) => {
  fs.writeSync(2, `the runner ended by ${signal ?? code}\n`);
  process.kill(process.pid, 'SIGKILL'); // an exit would wait for the thread that waits for it
});

const flags = new SharedArrayBuffer(16); // stop, busy, position, whether the next answer fails
const state = new Int32Array(flags);
const worker = new Worker(path.join(__dirname, 'worklet.cjs'), { workerData: { flags, fds } });
const waiting = new Map();
const remotes = [];
worker.on('message', (said) => {
  if (said.call !== undefined) { remotes[said.call](...said.args); return; }
  const { resolve, reject } = waiting.get(said.id);
  waiting.delete(said.id);
  if (said.ok) resolve(said.value); else reject(new Error(said.error));
});

function call(what) {
  if (state[1]) throw new Error('RESOURCE_BUSY');
  ask(fds, what);
  const said = listen(fds);
  if (said.failed) throw new Error(said.failed);
  return said.done;
}

function createLLMRunner(modelPath, tokenizerPath) {
  call({ new: [modelPath, tokenizerPath] });
  Atomics.store(state, 2, 0);
  return {
    runner: true, modelPath, tokenizerPath, modalities: [],
    stop: () => Atomics.store(state, 0, 1),
    reset: () => { call({ reset: true }); Atomics.store(state, 2, 0); },
    dispose: () => undefined,
    getKVCacheState: () => ({ pos: Atomics.load(state, 2), maxSeqLen: world.context }),
  };
}
const loadTokenizer = () => ({
  encode: (text) => new Int32Array(call({ encode: text })), dispose: () => undefined });
createLLMRunner.native = loadTokenizer.native = true;

const wrapAsync = (fn) => (...args) => {
  if (fn.native) return Promise.resolve().then(() => fn(...args));
  const id = waiting.size + Math.random();
  const plain = args.map((arg) => (typeof arg === 'function' ? { remote: remotes.push(arg) - 1 }
    : arg && arg.runner ? { runner: true } : arg));
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    const { code } = fn.__initData;
    worker.postMessage({ code, closure: Object.keys(fn.__closure), args: plain, id });
  });
};

const world = { memory: 4e9, context: 0, os: 'ios', bundleDir: '' };
const blobs = {
  dirs: { DocumentDir: documents, CacheDir: documents,
    get MainBundleDir() { return world.bundleDir; } },
  exists: async (file) => fs.existsSync(file),
  isDir: async (file) => fs.existsSync(file) && fs.statSync(file).isDirectory(),
  stat: async (file) => ({ size: fs.statSync(file).size }),
  mkdir: async (file) => fs.mkdirSync(file),
  asset: (file) => path.join(world.bundleDir, file),
  cp: async (from, to) => fs.copyFileSync(from, to),
  writeFile: async (file, text) => fs.writeFileSync(file, text),
  hash: async (file, kind) => crypto.createHash(kind).update(fs.readFileSync(file)).digest('hex'),
};
const modules = {
  'react-native': { Platform: { get OS() { return world.os; } } },
  'react-native-blob-util': { __esModule: true, default: { fs: blobs } },
  'react-native-device-info': { getTotalMemory: async () => world.memory },
  'react-native-executorch': {
    llm: { createLLMRunner }, nlp: { loadTokenizer }, wrapAsync },
  'react-native-executorch/package.json': { version },
  'react-native-worklets': { scheduleOnRN: () => { throw new Error('not on a worklet'); } },
};
const load = Module._load;
Module._load = (name, ...rest) => modules[name] ?? load(name, ...rest);

exports.world = world;
exports.failNext = () => Atomics.store(state, 3, 1);
exports.position = () => Atomics.load(state, 2);
exports.end = async () => { server.removeAllListeners('exit'); server.kill(); await worker.terminate(); };
