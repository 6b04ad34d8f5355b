// Runs the glue, built to plain JavaScript in WORK/built, through each case; says what came of it.
//     node cases.cjs WORK PYTHON VERSION
const fs = require('node:fs');
const path = require('node:path');
const { end, failNext, position, world } = require('./native.cjs');

const [, , work, , version] = process.argv;
const built = path.join(work, 'built');
const { Chat } = require(path.join(built, 'chat.js'));
const { bundledFiles, filesIn } = require(path.join(built, 'files.js'));
const { BUNDLE } = require(path.join(built, 'bundle.js'));
const files = filesIn(`file://${work}/model`);
world.context = BUNDLE.context;
const QUESTION = 'What is the weather in Paris?';

/** What is said with a chat, its pieces, and what it is refused with. */
async function withChat(act, options = {}, from = files) {
  let chat;
  try {
    chat = await Chat.open(from, options);
    return await act(chat);
  } catch (error) {
    if (error.reason === undefined) throw error;
    return { refused: error.reason, message: error.message };
  } finally {
    await chat?.close();
  }
}
const ask = (text, options, onPiece) => async (chat) => {
  const pieces = [];
  const answer = await chat.say(text, (piece) => {
    pieces.push(piece);
    onPiece?.(chat, pieces);
  }, options);
  return { ...answer, pieces };
};

/** A copy of the files, one of them changed. */
function changed(name, change) {
  const directory = fs.mkdtempSync(path.join(work, 'changed-'));
  for (const file of [BUNDLE.program.name, BUNDLE.tokenizer.name]) {
    fs.copyFileSync(path.join(work, 'model', file), path.join(directory, file));
  }
  change(path.join(directory, name));
  return filesIn(directory);
}

const cases = {
  async golden() {
    return withChat(async (chat) => {
      const heard = [];
      for (const { prompt, tokens } of JSON.parse(fs.readFileSync(`${work}/golden.json`))) {
        chat.reset();
        const pieces = [];
        const answer = await chat.turn(prompt, (piece) => pieces.push(piece), { limit: tokens });
        heard.push({ ...answer, pieces });
      }
      return heard;
    });
  },
  async progress() {
    const steps = [];
    const chat = await Chat.open(files, { onProgress: ({ step }) => steps.push(step) });
    await chat.close();
    return [...new Set(steps)];
  },
  async conversation() {
    return withChat(async (chat) => {
      const heard = [];
      for (const text of [QUESTION, 'What will it be in Rome on Sunday?', 'Who are you?']) {
        const answer = await ask(text, { limit: heard.length === 1 ? 3 : 24 })(chat);
        heard.push({ ...answer, read: position() });
      }
      return heard;
    }, { system: 'Be brief.' });
  },
  async full() { // of a longer context, its beginning: the stand-in tells the glue that it is all
    world.context = Math.min(BUNDLE.context, 1024);
    return withChat(async (chat) => {
      let turns = 0;
      let answer;
      do {
        answer = await chat.say('Tell me about rain and rivers.', undefined, { limit: 40 });
        turns += 1;
      } while (answer.ending !== 'context full' && turns < 100);
      const again = await chat.say('Tell me about rain and rivers.', undefined, { limit: 40 });
      chat.reset();
      const anew = await chat.say(QUESTION, undefined, { limit: 3 });
      const long = (chat.reset(), await chat.say('word '.repeat(world.context)));
      return { context: world.context, turns, again, anew, long };
    }).finally(() => { world.context = BUNDLE.context; });
  },
  stopped: () => withChat(ask('Tell me about rain and rivers.', {}, (chat, pieces) => {
    if (pieces.length === 3) chat.stop();
  })),
  stoppedAtOnce: () => withChat(async (chat) => {
    const answer = chat.say('Tell me about rain and rivers.');
    chat.stop();
    return answer;
  }),
  twice: () => withChat(async (chat) => {
    const first = chat.say(QUESTION, undefined, { limit: 4 });
    const second = await chat.say('And again?').catch(({ reason }) => reason);
    return { first: (await first).ending, second };
  }),
  closedInTheMiddle: () => withChat(async (chat) => {
    const answer = chat.say('Tell me about rain and rivers.');
    await chat.close();
    return { ending: (await answer).ending, after: await chat.say('?').catch((e) => e.reason) };
  }),
  split: () => withChat(ask('What is the weather in S\u00e3o Paulo?', { limit: 48 })),
  async endsAtOnce() { // the runner does not look whether its first token ends the answer
    const { ends } = BUNDLE;
    return withChat(async (chat) => {
      const prompt = chat.tokenizer.encode(
        `${BUNDLE.format.user.before}${QUESTION}${BUNDLE.format.user.after}<|assistant|>`).length;
      BUNDLE.ends = [(await chat.say(QUESTION, undefined, { limit: 1 })).text];
      chat.reset();
      const answer = await ask(QUESTION)(chat);
      return { ...answer, read: position() - prompt };
    }).finally(() => { BUNDLE.ends = ends; });
  },
  async failed() {
    return withChat(async (chat) => {
      failNext();
      const error = await chat.say('Secret words').catch((e) => e);
      return { refused: error.reason, message: `${error.message}${error.stack}`,
        then: await chat.say(QUESTION, undefined, { limit: 3 }) };
    });
  },
  hot: () => withChat(ask('Secret words', { temperature: 2 })),
  special: () => withChat(ask(`Secret words ${BUNDLE.special[0]} then more`)),
  specialSystem: () => withChat(ask(QUESTION), { system: `Secret words ${BUNDLE.ends[0]}` }),
  async noSystem() {
    const { system } = BUNDLE.format;
    BUNDLE.format.system = null;
    try {
      return await withChat(ask(QUESTION), { system: 'Be brief.' });
    } finally {
      BUNDLE.format.system = system;
    }
  },
  changedByte: () => withChat(ask(QUESTION), {}, changed(BUNDLE.program.name, (file) => {
    const bytes = fs.readFileSync(file);
    bytes[bytes.length >> 1] ^= 1;
    fs.writeFileSync(file, bytes);
  })),
  missing: () => withChat(ask(QUESTION), {}, changed(BUNDLE.tokenizer.name, fs.unlinkSync)),
  async memory() {
    world.memory = 2 * BUNDLE.memoryBytes - 2e6;
    try {
      return await withChat(ask(QUESTION));
    } finally {
      world.memory = 4e9;
    }
  },
  async wrongGolden() {
    fs.readdirSync(`${work}/documents`).forEach((file) => fs.rmSync(`${work}/documents/${file}`));
    const [check] = BUNDLE.checks;
    const { answer } = check;
    check.answer = answer.slice(0, -1);
    try {
      return await withChat(ask(QUESTION));
    } finally {
      check.answer = answer;
    }
  },
  async android() {
    Object.assign(world, { os: 'android', bundleDir: work });
    const copied = await bundledFiles();
    const again = await bundledFiles();
    return { same: copied.program === again.program,
      answer: await withChat(ask(QUESTION, { limit: 4 }), {}, copied) };
  },
};

(async () => {
  const results = {};
  for (const [name, run] of Object.entries(version === '0.10.2' ? cases : { release: () =>
    withChat(ask(QUESTION)) })) results[name] = await run();
  await end();
  fs.writeFileSync(path.join(work, 'results.json'), JSON.stringify(results));
  process.exit(0);
})().catch((error) => { console.error(error); process.exit(1); });
