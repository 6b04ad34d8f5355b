import { ILayoutRestorer, type JupyterFrontEnd, type JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Dialog, ICommandPalette, showDialog, showErrorMessage } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IStatusBar } from '@jupyterlab/statusbar';
import { LabIcon } from '@jupyterlab/ui-components';
import { Widget } from '@lumino/widgets';

import { h, visible } from './elements';
import { Panel } from './panel';
import { ask, type Check } from './server';
import { STYLE } from './style';

const OPEN = 'cloister:open';
const NEW = 'cloister:new-lab';
const CHECK = 'cloister:check-notebook';
const FORGET = 'cloister:forget';

const icon = new LabIcon({
  name: 'cloister:arch',
  svgstr: '<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 16 16"><path class="jp-icon3" fill="#616161" ' +
    'd="M2 15V7a6 6 0 0 1 12 0v8h-4V8a2 2 0 0 0-4 0v7z"/></svg>'
});

/** Open a new notebook whose first cell shows the lab, and run it. */
async function newLab(app: JupyterFrontEnd, folder: string): Promise<void> {
  const { contents, kernelspecs } = app.serviceManager;
  await kernelspecs.ready;
  const name = kernelspecs.specs?.default ?? 'python3';
  const { path } = await contents.newUntitled({ path: folder, type: 'notebook' });
  await contents.save(path, {
    type: 'notebook', format: 'json', content: {
      nbformat: 4, nbformat_minor: 5,
      metadata: { kernelspec: { name, display_name: kernelspecs.specs?.kernelspecs[name]?.display_name ?? name } },
      cells: [{
        cell_type: 'code', id: 'lab', metadata: {}, outputs: [], execution_count: null,
        source: 'from cloister_jupyter import PromptLab\n\nPromptLab()'
      }]
    }
  });
  const opened = await app.commands.execute('docmanager:open', { path });
  if (opened?.sessionContext) { // another tab of the browser has it where there is one a notebook
    await Promise.all([opened.context.ready, opened.sessionContext.ready]);
    await app.commands.execute('notebook:run-cell');
  }
}

/** Show what a notebook's file holds that passed through a lab. */
async function check(path: string, unsaved: boolean): Promise<void> {
  const { files, findings, fingerprints, cures } = await ask<Check>('check', { path });
  const sought = fingerprints === null ? 'There is no vault: only forms of personal data were looked for.'
    : `${fingerprints} fingerprints of texts, and forms of personal data, were looked for.`;
  const heads = ['file', 'cell', 'place', 'kind', 'count'];
  const node = h('div', { class: 'cx-found' },
    h('p', {}, findings.length ? 'Found:' : `Nothing was found in ${files.map(visible).join(' and ')}.`),
    ...(findings.length ? [h('table', {},
      h('thead', {}, h('tr', {}, ...heads.map(head => h('th', { scope: 'col' }, head)))),
      h('tbody', {}, ...findings.map(found => h('tr', {}, ...[
        found.file, found.cell || '-', found.place, found.kind, found.count
      ].map(value => h('td', {}, visible(`${value}`)))))))] : []),
    ...[sought, ...cures.map(visible), ...(unsaved ? ['It was searched as it was last saved.'] : [])].map(line => h('p', {}, line)));
  await showDialog({ title: 'Leak check', body: new Widget({ node }), buttons: [Dialog.okButton()] });
}

function activate(
  app: JupyterFrontEnd, palette: ICommandPalette | null, launcher: ILauncher | null, tracker: INotebookTracker | null,
  status: IStatusBar | null, restorer: ILayoutRestorer | null
): void {
  const { commands, shell } = app;
  document.documentElement.translate = false; // a browser's translator would send the page away
  document.head.append(h('style', {}, STYLE));

  const button = h('button', { class: 'cx-badge', type: 'button', onclick: () => void commands.execute(OPEN) }, 'Cloister');
  const panel = new Panel(({ groups, summary }) => {
    const bad = groups.flatMap(({ facts }) => facts).filter(({ good }) => good === false).length;
    button.textContent = bad ? `Cloister: ${bad} to look at` : 'Cloister: guarded';
    button.title = summary;
  });
  panel.title.icon = icon;
  panel.title.caption = 'Cloister';
  shell.add(panel, 'left', { rank: 600 });
  restorer?.add(panel, panel.id);
  status?.registerStatusItem('cloister:badge', { item: new Widget({ node: h('div', {}, button) }), align: 'right', rank: 90 });
  void app.restored.then(() => panel.audit());

  /** Run what a command does, and show the sentence of what fails. */
  const add = (id: string, label: string, execute: (args: { cwd?: string }) => Promise<void>, isEnabled?: () => boolean) => {
    commands.addCommand(id, {
      label: ({ cwd }) => cwd === undefined ? label : 'Prompt Lab', // on a card of the launcher
      icon: id === NEW ? icon : undefined, isEnabled,
      execute: args => execute(args).catch((error: Error) => showErrorMessage('Cloister', error.message))
    });
    palette?.addItem({ command: id, category: 'Cloister' });
  };
  add(OPEN, 'Show the Cloister Panel', async () => shell.activateById(panel.id));
  add(NEW, 'New Notebook with the Prompt Lab', ({ cwd }) => newLab(app, cwd ?? ''));
  add(CHECK, 'Check This Notebook for Leaks', async () => {
    const context = tracker?.currentWidget?.context;
    await (context && check(context.path, context.model.dirty));
  }, () => !!tracker?.currentWidget);
  add(FORGET, 'Forget a Conversation…', async () => {
    await panel.refresh();
    const kept = panel.conversations;
    if (!kept.length) {
      throw new Error('There is no conversation to forget, or the vault is locked.');
    }
    const items = kept.map((each, index) => `${index + 1}. ${visible(each.name)}`);
    // A list of the page's own would stay in the browser's profile.
    const list = h('select', { autocomplete: 'off', 'aria-label': 'Conversation' }, ...items.map(item => h('option', {}, item)));
    const { button } = await showDialog({
      title: 'Forget a conversation', body: new Widget({ node: h('div', {}, list) }),
      buttons: [Dialog.cancelButton(), Dialog.okButton({ label: 'Go on' })]
    });
    const conversation = kept[list.selectedIndex];
    if (button.accept && conversation) {
      await panel.forget(conversation);
    }
  });
  launcher?.add({ command: NEW, category: 'Cloister', rank: 10 });
}

const plugin: JupyterFrontEndPlugin<void> = {
  id: 'cloister-jupyter:plugin',
  description: 'Tiers, the vault and what holds for privacy, beside the notebooks.',
  autoStart: true,
  optional: [ICommandPalette, ILauncher, INotebookTracker, IStatusBar, ILayoutRestorer],
  activate
};

export default plugin;
