// @ts-check
/**
 * Changes to the document. Text goes in as text nodes only, so whatever a route, an error or an answer says, it is shown
 * and never obeyed.
 */

/** @param {string} id */
export const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {Element} node @param {string} text */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** @param {string} tag @param {string} [name] @param {string} [text] */
export function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  return node;
}

/**
 * Give `list` one child per item, in order. A child that is open or has the focus stays although its item is gone:
 * nothing is pulled away from under a reader.
 * @template T
 * @param {HTMLElement} list @param {T[]} items @param {(item: T) => string} key
 * @param {(item: T) => HTMLElement} create @param {(node: HTMLElement, item: T) => void} update
 */
export function sync(list, items, key, create, update) {
  /** @type {Map<string, HTMLElement>} */
  const have = new Map();
  const wanted = new Set(items.map(key));
  for (const node of /** @type {HTMLElement[]} */ ([...list.children])) {
    const id = node.dataset.key ?? "";
    if (wanted.has(id)) have.set(id, node);
    else if (!node.querySelector("details[open]") && !node.contains(document.activeElement)) node.remove();
  }
  let cursor = list.firstElementChild;
  for (const item of items) {
    const id = key(item);
    const node = have.get(id) ?? create(item);
    node.dataset.key = id;
    update(node, item);
    while (cursor && !wanted.has(/** @type {HTMLElement} */ (cursor).dataset.key ?? "")) cursor = cursor.nextElementSibling;
    if (node === cursor) cursor = cursor.nextElementSibling;
    else list.insertBefore(node, cursor);
  }
}
