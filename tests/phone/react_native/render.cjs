// Lays conversations out as react-native-executorch does: reads [{template, conversations}] from
// standard input, writes what each gives, or null where the template refuses it.
const path = require('node:path');

const { Template } = require(path.join(process.argv[2], '@huggingface/jinja'));
const laid = ({ template, conversations }) => {
  const parsed = new Template(template);
  return conversations.map((messages) => {
    try {
      return parsed.render({ tools: undefined, messages, add_generation_prompt: true });
    } catch {
      return null;
    }
  });
};
const given = JSON.parse(require('node:fs').readFileSync(0, 'utf8'));
process.stdout.write(JSON.stringify(given.map(laid)));
