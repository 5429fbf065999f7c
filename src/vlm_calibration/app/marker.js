// A picture to paint on, with mouse, finger or keyboard. props.image is the picture as a data URL; the component's value is
// what was painted, as a PNG of the same shape: black where there is paint, transparent elsewhere, "" without any.
const canvas = element.querySelector('canvas');
const size = element.querySelector('input');
const context = canvas.getContext('2d');
const paint = document.createElement('canvas');
const picture = new Image();
const SIDE = 480;
let at = null; // the brush, in pixels of the canvas
let painting = false;
let empty = true;

function radius() { return Number(size.value) * Math.max(canvas.width, canvas.height) / 200; }

function draw() {
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = picture.naturalWidth > canvas.width;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!empty) {
    const tint = document.createElement('canvas');
    tint.width = canvas.width; tint.height = canvas.height;
    const colour = tint.getContext('2d');
    colour.drawImage(paint, 0, 0);
    colour.globalCompositeOperation = 'source-in';
    colour.fillStyle = '#D55E00';
    colour.fillRect(0, 0, tint.width, tint.height);
    context.globalAlpha = 0.6; context.drawImage(tint, 0, 0); context.globalAlpha = 1;
  }
  if (at) {
    for (const [width, style] of [[4, 'white'], [2, 'black']]) {
      context.beginPath(); context.arc(at.x, at.y, radius(), 0, 2 * Math.PI);
      context.lineWidth = width; context.strokeStyle = style; context.stroke();
    }
  }
}

function stroke(from, to) {
  const brush = paint.getContext('2d');
  brush.lineCap = 'round'; brush.lineWidth = 2 * radius(); brush.strokeStyle = 'black';
  brush.beginPath(); brush.moveTo(from.x, from.y); brush.lineTo(to.x + 0.01, to.y); brush.stroke();
  empty = false;
}

function wipe() {
  paint.width = canvas.width; paint.height = canvas.height; // which also clears it
  empty = true;
}

function tell() {
  props.value = empty ? '' : paint.toDataURL('image/png');
  trigger('input');
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return { x: (event.clientX - box.left) * canvas.width / box.width, y: (event.clientY - box.top) * canvas.height / box.height };
}

function show() {
  const scale = SIDE / Math.max(picture.naturalWidth, picture.naturalHeight);
  canvas.width = Math.max(1, Math.round(picture.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(picture.naturalHeight * scale));
  at = null;
  wipe(); draw();
}

picture.onload = show;
canvas.addEventListener('pointerdown', (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  painting = true; at = place(event); stroke(at, at); draw();
});
canvas.addEventListener('pointermove', (event) => {
  const next = place(event);
  if (painting) stroke(at, next);
  at = next; draw();
});
function lift() { if (painting) { painting = false; tell(); } }
canvas.addEventListener('pointerup', lift);
canvas.addEventListener('pointercancel', lift);
canvas.addEventListener('pointerleave', () => { if (!painting) { at = null; draw(); } });
canvas.addEventListener('focus', () => {
  if (!at && canvas.matches(':focus-visible')) { at = { x: canvas.width / 2, y: canvas.height / 2 }; draw(); }
});
canvas.addEventListener('blur', () => { at = null; draw(); });
canvas.addEventListener('keydown', (event) => {
  const by = (event.shiftKey ? 0.005 : 0.03) * SIDE;
  const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
  const before = at || { x: canvas.width / 2, y: canvas.height / 2 };
  if (event.key in moves) {
    const [dx, dy] = moves[event.key];
    at = { x: Math.min(canvas.width, Math.max(0, before.x + dx)), y: Math.min(canvas.height, Math.max(0, before.y + dy)) };
  } else if (event.key === ' ' || event.key === 'Enter') {
    at = before; stroke(at, at); tell();
  } else if (event.key === 'Delete' || event.key === 'Backspace') {
    if (!empty) { wipe(); tell(); }
  } else {
    return;
  }
  event.preventDefault(); draw();
});
size.addEventListener('input', draw);
element.querySelector('button').addEventListener('click', () => { if (!empty) { wipe(); draw(); tell(); } });
watch('value', () => { if (!props.value && !empty) { wipe(); draw(); } });
watch('image', () => { picture.src = props.image; });
if (props.image) picture.src = props.image;
