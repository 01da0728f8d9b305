// Elements of the page: finding and making them.

export const find = (selector) => document.querySelector(selector);

/** An element with properties, such as {className: "row"}, and children: elements and strings. */
export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that calls a function. `name` is what screen readers read out, if the text alone is not clear. */
export function button(text, act, name = text) {
  const made = element("button", { type: "button", ariaLabel: name }, text);
  made.addEventListener("click", act);
  return made;
}
