import { Dialog, InputDialog, showDialog } from '@jupyterlab/apputils';
import { Widget } from '@lumino/widgets';

import { h, inAge, inBytes, inCount, visible } from './elements';
import { ask, type Audit, type Conversation, type Kept, type Ladder, type Vault } from './server';

/** Beside the notebooks: what holds for privacy, which tiers fit, what the vault keeps. */
export class Panel extends Widget {
  private readonly _note = h('p', { class: 'cx-note', role: 'status' });
  private readonly _privacy = h('div');
  private readonly _tiers = h('div');
  private readonly _vault = h('div', { tabindex: '-1' });
  private _kept: Conversation[] = [];

  /** @param told of each audit */
  constructor(private readonly _told: (audit: Audit) => void) {
    super();
    this.id = 'cloister-panel';
    this.addClass('cx-panel');
    const section = (name: string, body: HTMLElement) =>
      h('section', { 'aria-label': name }, h('h3', {}, name), body);
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', 'Cloister');
    this.node.append(
      h('header', {}, h('h2', {}, 'Cloister'), this._button('Refresh', () => this.refresh())),
      this._note,
      section('Privacy', this._privacy),
      section('Vault', this._vault),
      section('Tiers on this machine', this._tiers)
    );
  }

  /** The conversations that are shown. */
  get conversations(): readonly Conversation[] {
    return this._kept;
  }

  /** Ask for everything again. */
  async refresh(): Promise<void> {
    await Promise.all([this._showAudit(), this._showTiers(), this._showVault()].map(part => this._say(part)));
  }

  /** Ask for the privacy of this server, and show it. */
  audit(): Promise<void> {
    return this._say(this._showAudit());
  }

  /** Delete a conversation, if the user agrees. */
  async forget(conversation: Conversation): Promise<void> {
    const asked = await showDialog({
      title: 'Forget this conversation?',
      body: `“${visible(conversation.name)}” and its key will be deleted. Nobody can bring it back.`,
      buttons: [Dialog.cancelButton(), Dialog.warnButton({ label: 'Forget' })]
    });
    if (asked.button.accept) {
      const { residue } = await ask<{ residue: string }>('vault/forget', { id: conversation.id });
      await this._showVault();
      this._note.textContent = `It is gone, and its key with it. ${residue}`;
    }
  }

  protected onAfterShow(): void {
    void this.refresh();
  }

  private async _export(conversation: Conversation): Promise<void> {
    const asked = await InputDialog.getText({
      title: 'Export this conversation in plain text',
      label: 'File, in the folder that this server shows. Whoever can read it reads the conversation.',
      text: 'conversation.json',
      okLabel: 'Export'
    });
    if (asked.button.accept && asked.value) {
      await ask('vault/export', { id: conversation.id, file: asked.value });
      this._note.textContent = `Written in plain text to ${visible(asked.value)}; keep it safe.`;
    }
  }

  private async _showAudit(): Promise<void> {
    const audit = await ask<Audit>('audit');
    this._told(audit);
    const marks = { true: ['✓', 'holds'], false: ['!', 'look at this'], null: ['·', 'for your information'] } as const;
    const opened = [...this._privacy.querySelectorAll('details')].map(({ open }) => open);
    const group = ({ name, facts }: Audit['groups'][number], index: number) =>
      h('details', { open: opened[index] ?? facts.some(({ good }) => good === false) }, h('summary', {}, name), h('dl', {}, ...facts.flatMap(fact => {
        const [sign, words] = marks[`${fact.good}`];
        return [
          h('dt', {}, h('span', { class: 'cx-mark', role: 'img', 'aria-label': words, 'data-good': `${fact.good}` }, sign), fact.name),
          h('dd', {}, fact.value)
        ];
      })));
    this._privacy.replaceChildren(h('p', {}, audit.summary), ...audit.groups.map(group));
  }

  private async _showTiers(): Promise<void> {
    const { ladders } = await ask<{ ladders: Ladder[] }>('tiers');
    this._tiers.replaceChildren(
      h('p', {}, `${inBytes(ladders[0]?.available_bytes ?? 0)} of memory are available.`),
      ...ladders.map(({ size, tiers }) => h('table', {},
        h('caption', {}, size === 'full' ? 'Full size' : 'The shipped family'),
        h('thead', {}, h('tr', {}, ...['tier', '4-bit size', 'memory', 'fits'].map(name => h('th', { scope: 'col' }, name)))),
        h('tbody', {}, ...tiers.map(tier => h('tr', {},
          h('th', { scope: 'row' }, tier.tier, h('small', {}, ` ${inCount(tier.parameters)}`)),
          h('td', {}, inBytes(tier.four_bit_bytes)), h('td', {}, inBytes(tier.memory_bytes)),
          h('td', {}, tier.fits_this_machine ? 'yes' : 'no'))))))
    );
  }

  private async _showVault(): Promise<void> {
    const parts = await this._vaultParts();
    const focused = this._vault.contains(document.activeElement);
    this._vault.replaceChildren(...parts);
    if (focused) { // what had the focus is gone
      this._vault.focus();
    }
  }

  private async _vaultParts(): Promise<Node[]> {
    const vault = await ask<Vault>('vault');
    this._kept = [];
    if (vault.state === 'none') {
      return [h('p', {}, 'There is none here. Make one with ', h('code', {}, 'cloister vault init'), '.')];
    }
    const parts: Node[] = [h('p', {}, `Key provider: ${vault.provider}; ${vault.protects}.`)];
    if (vault.state === 'locked') {
      return [...parts, this._unlocking()];
    }
    const kept = await ask<Kept>('vault/list', {});
    this._kept = kept.conversations;
    if (vault.asks) {
      parts.push(this._button('Lock', async () => {
        await ask('vault/lock', {});
        await this._showVault();
      }));
    }
    parts.push(this._kept.length
      ? h('ul', {}, ...this._kept.map(each => this._entry(each)))
      : h('p', {}, 'It keeps no conversation.'));
    if (kept.others.objects) {
      parts.push(h('p', {}, `And ${kept.others.objects} other objects (the lab's runs and grids, caches, fingerprints), ${inBytes(kept.others.bytes)}.`));
    }
    return parts;
  }

  private _entry(conversation: Conversation): HTMLElement {
    const { namespace, bytes, hours } = conversation, name = visible(conversation.name);
    const whose = namespace === 'default' ? '' : ` · ${namespace}`;
    return h('li', {},
      h('bdi', {}, name), h('small', {}, `${inBytes(bytes)} · ${inAge(hours)}${whose}`),
      h('span', { class: 'cx-actions' },
        this._button('Export…', () => this._export(conversation), `Export ${name}`),
        this._button('Forget…', () => this.forget(conversation), `Forget ${name}`)));
  }

  private _unlocking(): HTMLElement {
    const field = h('input', { type: 'password', autocomplete: 'off', id: 'cx-passphrase', 'data-lm-suppress-shortcuts': 'true' });
    const submit = async (event: Event) => {
      event.preventDefault();
      const passphrase = field.value;
      field.value = '';
      await this._say(ask('vault/unlock', { passphrase }).then(() => this._showVault()));
    };
    return h('form', { onsubmit: submit },
      h('label', { for: 'cx-passphrase' }, 'It is locked. Passphrase:'), field, h('button', { type: 'submit' }, 'Unlock'));
  }

  private _button(words: string, action: () => Promise<void>, label?: string): HTMLButtonElement {
    return h('button', { type: 'button', 'aria-label': label, onclick: () => void this._say(action()) }, words);
  }

  /** Show the sentence of what fails. */
  private async _say(work: Promise<void>): Promise<void> {
    this._note.textContent = '';
    await work.catch((error: Error) => { this._note.textContent = error.message; });
  }
}
