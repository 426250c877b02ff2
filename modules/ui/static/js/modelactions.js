// What can be done with a model's files: rename, delete to the trash and back, the folder, settings of another product.

import { del, get, post } from './api.js';
import { askText, confirmDialog, openDialog } from './dialog.js';
import { ago, bytes, h, plural } from './dom.js';
import { fileButton } from './form.js';
import { refreshModels } from './models.js';
import { fail, toast } from './toast.js';

async function done(work, words) {
  try {
    const answer = await work();
    await refreshModels();
    if (words) toast(words(answer), { level: 'success' });
    return answer;
  } catch (error) {
    fail(error);
    return null;
  }
}

export async function renameModel(model) {
  const name = await askText('Rename the model', model.id, 'Rename');
  if (name && name !== model.id) await done(() => post('models/rename', { model: model.id, name }), ({ model: now }) => `It is called ${now} now.`);
}

export async function trashModel(model) {
  const words = `${bytes(model.size_bytes)} go to the trash. They come back from there until it is emptied.`;
  if (!(await confirmDialog(`Delete ${model.id}?`, words, 'Delete'))) return;
  const answer = await done(() => post('models/trash', { model: model.id }));
  if (answer) toast(`${model.id} is in the trash.`, { action: { label: 'Undo', run: () => restore(answer.entry.id) } });
}

const restore = (id) => done(() => post(`trash/${id}/restore`), ({ model }) => `${model} is back.`);

export const openFolder = (model) => post('models/open', { model: model.id }).catch(fail);

export async function showTrash() {
  let entries;
  try {
    ({ entries } = await get('trash'));
  } catch (error) {
    fail(error);
    return;
  }
  const list = h('ul', { class: 'sy-trash' });
  const row = (entry) => {
    const back = h('button', { type: 'button', class: 'sy-button', 'data-testid': 'trash-restore' }, 'Put back');
    const item = h('li', { 'data-testid': 'trash-row' }, h('span', { dir: 'auto' }, entry.model, h('small', {}, ` ${bytes(entry.size_bytes)}, ${ago(entry.deleted_at * 1000)}`)), back);
    back.addEventListener('click', async () => {
      if (await restore(entry.id)) item.remove();
    });
    return item;
  };
  list.append(...entries.map(row));
  const total = entries.reduce((sum, entry) => sum + entry.size_bytes, 0);
  const chosen = await openDialog({
    title: 'Trash',
    body: entries.length ? list : h('p', {}, 'The trash is empty.'),
    actions: [...(entries.length ? [{ label: 'Empty the trash', value: 'empty', danger: true }] : []), { label: 'Close', value: null, primary: true }],
    wide: true,
    testid: 'trash-dialog',
  });
  if (chosen !== 'empty') return;
  const words = `${plural(entries.length, 'model')}, ${bytes(total)}, are deleted for good.`;
  if (await confirmDialog('Empty the trash?', words, 'Delete for good')) await done(() => del('trash'), ({ freed_bytes: freed }) => `${bytes(freed)} are free again.`);
}

export async function importSettings() {
  const result = h('div', { 'data-testid': 'import-result' });
  const take = async (name, text) => {
    try {
      const { saved, skipped } = await post('models/settings/import', { text });
      result.replaceChildren(
        h('p', {}, saved.length ? `Settings of ${plural(saved.length, 'model')} taken.` : 'Nothing in it is for a model that is here.'),
        saved.length ? h('ul', {}, saved.map((entry) => h('li', { dir: 'auto' }, h('strong', {}, entry.model), `: ${entry.loader}`, Object.keys(entry.options).length ? `, ${Object.keys(entry.options).join(', ')}` : ''))) : '',
        skipped.length ? h('details', { open: !saved.length }, h('summary', {}, `${skipped.length} left out`), h('ul', {}, skipped.map((entry) => h('li', { dir: 'auto' }, h('strong', {}, entry.what), `: ${entry.reason}`)))) : '',
      );
      await refreshModels();
      window.switchyard?.refreshControls('options');
    } catch (error) {
      fail(error);
    }
  };
  await openDialog({
    title: 'Import settings',
    body: h('div', {}, h('p', {}, 'text-generation-webui keeps each model’s loader and options in user_data/models/config-user.yaml. What has a place here is taken over.'), fileButton('Choose the file…', '.yaml,.yml', take, 'settings-file'), result),
    actions: [{ label: 'Close', value: null, primary: true }],
    wide: true,
    testid: 'import-dialog',
  });
}
