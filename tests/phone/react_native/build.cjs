// Turns the glue's TypeScript into plain JavaScript:  node build.cjs FROM TO  (typescript required)
const fs = require('node:fs');
const path = require('node:path');
const ts = require(path.join(process.argv[2], 'node_modules/typescript'));

const [, , from, to] = process.argv;
for (const name of ['bundle', 'chat', 'files']) {
  const source = fs.readFileSync(path.join(from, `src/${name}.ts`), 'utf8');
  const { outputText } = ts.transpileModule(source, { compilerOptions: {
    module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2022, esModuleInterop: true } });
  fs.writeFileSync(path.join(to, `${name}.js`), outputText);
}
