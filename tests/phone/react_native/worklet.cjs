// The thread of worklets: runs the text that the plugin of worklets made of a function, with what
// that closes over; and makes its native call, which blocks this thread.
const { parentPort, workerData } = require('node:worker_threads');
const { ask, listen } = require('./lines.cjs');

const flags = new Int32Array(workerData.flags);
const shared = {
  scheduleOnRN: (remote, ...args) => parentPort.postMessage({ call: remote.remote, args }),
};

const native = {
  stop: () => Atomics.store(flags, 0, 1),
  generate(prompt, config, onToken) {
    if (Atomics.exchange(flags, 3, 0)) throw new Error(`no answer to ${prompt}`);
    Atomics.store(flags, 1, 1);
    try {
      ask(workerData.fds, {
        generate: prompt, most: config.maxNewTokens, temperature: config.temperature,
        echo: config.echo });
      for (;;) {
        const said = listen(workerData.fds);
        if (said.failed) throw new Error(said.failed);
        if (said.done) {
          Atomics.add(flags, 2, said.done[0] + said.done[1]);
          return { numPromptTokens: said.done[0], numGeneratedTokens: said.done[1] };
        }
        onToken(Buffer.from(said.piece, 'base64').toString('utf8')); // half a character: U+FFFD
        ask(workerData.fds, { stop: Atomics.exchange(flags, 0, 0) === 1 });
      }
    } finally {
      Atomics.store(flags, 1, 0);
    }
  },
};

parentPort.on('message', ({ code, closure, args, id }) => {
  const given = args.map((arg) => (arg && arg.runner ? native : arg));
  let answer;
  try {
    const missing = closure.filter((name) => !(name in shared));
    if (missing.length > 0) throw new Error(`a worklet closes over ${missing}`);
    answer = { ok: true, value: eval(`(${code})`).apply({ __closure: shared }, given) };
  } catch (error) {
    answer = { ok: false, error: error.message };
  }
  parentPort.postMessage({ id, ...answer });
});
