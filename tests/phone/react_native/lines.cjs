// Lines of JSON to and from another process, by calls that block, as native ones do.
const fs = require('node:fs');

let rest = '';
exports.ask = (fds, what) => fs.writeSync(fds.asks, `${JSON.stringify(what)}\n`);
exports.listen = (fds) => {
  const block = Buffer.alloc(65536);
  while (!rest.includes('\n')) {
    const size = fs.readSync(fds.says, block, 0, block.length, null);
    if (size === 0) throw new Error('the runner has ended');
    rest += block.toString('utf8', 0, size);
  }
  const line = rest.slice(0, rest.indexOf('\n'));
  rest = rest.slice(line.length + 1);
  return JSON.parse(line);
};
