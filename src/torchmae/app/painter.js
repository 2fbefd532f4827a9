// The mask over the image: one pixel of the canvas for each patch, stretched over the picture.
// props.value is what markup.painter gives; the "input" event carries the masked patches.
const canvas = element.querySelector("canvas");
const picture = element.querySelector("img");
const hidden = new Set();
let cursor = 0; // the patch that the keyboard is on
let hiding = null; // while painting: whether patches are hidden or shown
let last = null;

function draw() {
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "rgb(116, 124, 138)";
  for (const patch of hidden) pen.fillRect(patch % canvas.width, Math.floor(patch / canvas.width), 1, 1);
}

function load() {
  const value = props.value;
  element.querySelector(".painter").hidden = !value;
  hidden.clear();
  if (!value) return;
  picture.src = value.image;
  canvas.ariaLabel = value.label;
  canvas.width = value.columns;
  canvas.height = value.rows;
  for (const patch of value.hidden) hidden.add(patch);
  cursor = Math.min(cursor, value.rows * value.columns - 1);
  draw();
  canvas.dataset.hidden = hidden.size;
}

const clamp = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value)));

function place(event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return [clamp(x * canvas.width, canvas.width), clamp(y * canvas.height, canvas.height)];
}

function set(column, row) {
  const patch = row * canvas.width + column;
  if (hiding) hidden.add(patch);
  else hidden.delete(patch);
}

function stroke([column, row]) {
  // A fast pointer skips patches: all on the line from the last one are meant.
  const [fromColumn, fromRow] = last ?? [column, row];
  const steps = Math.max(Math.abs(column - fromColumn), Math.abs(row - fromRow), 1);
  for (let i = 0; i <= steps; i++) {
    set(
      Math.round(fromColumn + ((column - fromColumn) * i) / steps),
      Math.round(fromRow + ((row - fromRow) * i) / steps),
    );
  }
  last = [column, row];
  draw();
}

function tell() {
  canvas.dataset.hidden = hidden.size;
  trigger("input", { hidden: [...hidden].sort((a, b) => a - b) });
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  const [column, row] = place(event);
  hiding = !hidden.has(row * canvas.width + column);
  last = null;
  stroke([column, row]);
});
canvas.addEventListener("pointermove", (event) => {
  if (hiding !== null && event.isPrimary) stroke(place(event));
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (hiding === null || !event.isPrimary) return;
    hiding = null;
    tell();
  });
}

canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const [right, down] = moves[event.key];
  const column = clamp((cursor % canvas.width) + right, canvas.width);
  const row = clamp(Math.floor(cursor / canvas.width) + down, canvas.height);
  cursor = row * canvas.width + column;
  if (event.key === " ") {
    hiding = !hidden.has(cursor);
    set(column, row);
    hiding = null;
    tell();
  }
  draw();
  const pen = canvas.getContext("2d");
  pen.fillStyle = "rgba(239, 138, 23, 0.8)";
  pen.fillRect(column, row, 1, 1);
});
canvas.addEventListener("blur", draw);

watch("value", load);
load();
