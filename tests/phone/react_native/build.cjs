// Builds the glue as an app does, by React Native's preset and the plugin of worklets, into what
// Hermes and Node read:  node build.cjs APP TO
const fs = require('node:fs');
const path = require('node:path');

const [, , app, to] = process.argv;
const find = (name) => require.resolve(name, { paths: [app] });
const babel = require(find('@babel/core'));
for (const name of ['bundle', 'chat', 'files', 'index', 'useChat']) {
  const { code } = babel.transformFileSync(path.join(app, `src/${name}.ts`), {
    configFile: false, babelrc: false,
    presets: [find('@react-native/babel-preset')], plugins: [find('react-native-worklets/plugin')] });
  fs.writeFileSync(path.join(to, `${name}.js`), code);
}
