/** JupyterLab's variables, so that each theme is followed. */
export const STYLE = `
.cx-panel { overflow: auto; padding: 8px 10px; color: var(--jp-ui-font-color1); background: var(--jp-layout-color1);
  font-size: var(--jp-ui-font-size1); line-height: 1.4; container-type: inline-size; }
.cx-panel header { display: flex; justify-content: space-between; align-items: center; }
.cx-panel h2 { font-size: var(--jp-ui-font-size2); margin: 0; }
.cx-panel h3 { font-size: var(--jp-ui-font-size1); margin: 14px 0 4px; padding-top: 8px; border-top: 1px solid var(--jp-border-color1); }
.cx-panel p { margin: 4px 0; overflow-wrap: anywhere; }
.cx-note:empty { display: none; }
.cx-note { border-inline-start: 4px solid var(--jp-brand-color1); padding-inline-start: 6px; }
.cx-panel :focus-visible, .cx-badge:focus-visible { outline: 2px solid var(--jp-brand-color1); outline-offset: 1px; }
.cx-panel button, .cx-panel input { font: inherit; color: inherit; background: var(--jp-layout-color2);
  border: 1px solid var(--jp-border-color1); border-radius: 3px; padding: 2px 8px; min-height: 24px; box-sizing: border-box; }
.cx-panel button { cursor: pointer; }
.cx-panel input { background: var(--jp-layout-color1); width: 100%; margin: 4px 0; }
.cx-panel summary { cursor: pointer; }
.cx-panel dl { margin: 2px 0 6px; }
.cx-panel dt { font-weight: 600; margin-top: 4px; }
.cx-panel dd { margin: 0 0 0 1.3em; overflow-wrap: anywhere; }
.cx-mark { display: inline-block; width: 1.3em; font-weight: 700; }
.cx-mark[data-good="false"] { color: var(--jp-error-color1); }
.cx-panel table { width: 100%; border-collapse: collapse; margin: 6px 0; font-variant-numeric: tabular-nums; }
.cx-panel caption { text-align: start; font-weight: 600; }
.cx-panel th, .cx-panel td { text-align: end; padding: 2px 0 2px 6px; border-bottom: 1px solid var(--jp-border-color2); vertical-align: top; }
.cx-panel th:first-child { text-align: start; padding-inline-start: 0; }
.cx-panel th { font-weight: normal; }
.cx-panel small { display: block; font-size: var(--jp-ui-font-size0); }
.cx-panel ul { list-style: none; margin: 4px 0; padding: 0; }
.cx-panel li { padding: 4px 0; border-bottom: 1px solid var(--jp-border-color2); overflow-wrap: anywhere; }
.cx-panel bdi { font-weight: 600; }
.cx-actions { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 2px; }
.cx-badge { font: inherit; color: inherit; background: none; border: 0; cursor: pointer; height: 100%; padding: 0 6px; }
.cx-found td, .cx-found th { text-align: start; padding: 2px 10px 2px 0; }
`;
