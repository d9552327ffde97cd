'use strict' // A map of photos on a canvas: dmlMap(element, data, options). No other file is needed but map.css
/* data: what `map_data` gives, and perhaps `sheets` and `large` ({side, cols, urls}: photos by slot, small and large) and `near` ([[row, score], ...] of each row)
   options: near(i) -> [[row, score], ...] or a promise of it; thumb(i) -> address of a larger photo; select(i), lasso(rows) are called back;
   open(i) and openText: a button for the photo that is selected; threshold: score below which a neighbour counts as another class
   result: {select, find, lasso, show, fit, clear, draw, at, state, destroy} */
window.dmlMap = (root, data, options={}) => {
  if (root.dmlMap) root.dmlMap.destroy()
  const n = data.x.length, {c, item, classes, colour} = data
  const shape = Math.max(.6, Math.min(1.8, root.clientWidth/Math.max(root.clientHeight-60, 1))) // the map is as wide or as high as its place, from 0 to `wide` and `high`
  const wide = Math.max(1, shape), high = Math.max(1, 1/shape), x = Float32Array.from(data.x, o => o*wide), y = Float32Array.from(data.y, o => o*high)
  const palettes = {
    light:['#df6862','#1f7dcf','#5da660','#955dbc','#be8628','#008f97','#d4679f','#7f8006','#7988ed','#009167','#d97230','#0088b1'],
    dark:['#ff958d','#5aa3ec','#80cd82','#b786db','#e8aa4e','#2bb3b9','#f594c3','#a4a537','#9fb0ff','#51b48d','#fa9d68','#42acd2']}
  const clamp = (v, lo, hi) => Math.max(lo, Math.min(hi, v)), fold = s => s.toLowerCase().replaceAll('_', ' ')
  const count = (k, one, more=one+'s') => `${k.toLocaleString('en')} ${k===1 ? one : more}`

  // ---- elements: text is only ever text ----
  const el = (tag, props={}, ...kids) => {
    const o = document.createElement(tag)
    for (const [k, v] of Object.entries(props)) k in o ? o[k] = v : o.setAttribute(k, v)
    o.append(...kids)
    return o
  }
  const canvas = el('canvas', {className:'dm-canvas', tabIndex:0, role:'application',
    'aria-label':`Map of ${count(n, 'item')}. Arrow keys go from item to item, plus and minus zoom, 0 shows all, slash searches.`})
  const input = el('input', {type:'search', placeholder:'Find a class', autocomplete:'off', spellcheck:false, role:'combobox',
    'aria-label':'Find a class', 'aria-expanded':'false', 'aria-controls':'dm-list', 'aria-autocomplete':'list'})
  const list = el('ul', {className:'dm-list', id:'dm-list', role:'listbox', hidden:true}), found = el('span', {className:'dm-found'})
  const button = (text, title, click) => el('button', {type:'button', title, 'aria-label':title, onclick:click}, text)
  const toggle = (text, title, key) => {
    const o = button(text, title, () => { view[key] = !view[key]; o.setAttribute('aria-pressed', view[key]); canvas.classList.toggle('dm-lassoing', view.lassoing); ask() })
    o.className = 'dm-toggle'; o.setAttribute('aria-pressed', false)
    return o
  }
  const photosButton = toggle('Photos', 'Photos where there is room, or dots (p)', 'photos')
  const namesButton = toggle('Names', 'Names of classes whose items lie together (n)', 'names')
  const lassoButton = toggle('Lasso', 'Draw around items to list them (l, or drag with shift)', 'lassoing')
  const bar = el('div', {className:'dm-bar'}, el('div', {className:'dm-search'}, input, found, list),
    el('div', {className:'dm-tools'}, photosButton, namesButton, lassoButton),
    el('div', {className:'dm-tools dm-zoom'}, button('−', 'Zoom out (-)', () => zoomBy(1/1.6)), button('+', 'Zoom in (+)', () => zoomBy(1.6)),
      button('Fit', 'Show all (0)', () => api.fit())))
  const tip = el('div', {className:'dm-tip', hidden:true}), panel = el('aside', {className:'dm-panel', hidden:true, 'aria-label':'Selected items'})
  const said = el('div', {className:'dm-said', 'aria-live':'polite'})
  const hint = el('div', {className:'dm-hint'}, `${count(n, 'item')}, ${count(classes.length, 'class', 'classes')}`,
    el('span', {className:'dm-how'}, ' · scroll to zoom, drag to move, shift-drag to select'))
  root.classList.add('dm-map')
  root.replaceChildren(bar, el('div', {className:'dm-stage'}, canvas, hint, tip), panel, said)
  const gone = new AbortController(), stage = canvas.parentNode, ctx = canvas.getContext('2d')

  // ---- state ----
  const view = {k:1, tx:0, ty:0, photos:!!data.sheets, names:!data.sheets, lassoing:false}
  photosButton.hidden = !data.sheets
  photosButton.setAttribute('aria-pressed', view.photos); namesButton.setAttribute('aria-pressed', view.names)
  let w = 0, h = 0, dpr = 1, style = {}, hue = palettes.light, asked = 0, touched = false
  let selected = -1, near = [], nearRoom = new Map(), hover = -1, within = null, path = null
  let shown = null, room = new Float32Array(n), roomOf = room // rows that match a search, as a Set, and the room that they have then
  const scheme = matchMedia('(prefers-color-scheme: dark)')
  const colours = () => {
    const css = getComputedStyle(root)
    for (const k of ['bg','surface','ink','soft','accent','good','bad']) style[k] = css.getPropertyValue('--dm-'+k).trim()
    hue = palettes[scheme.matches ? 'dark' : 'light']
    ask()
  }
  const sx = i => x[i]*view.k+view.tx, sy = i => y[i]*view.k+view.ty, paint = i => hue[colour[c[i]]%hue.length]

  // ---- where is what: a grid over the map ----
  const g = clamp(Math.ceil(Math.sqrt(n/3)), 1, 128), col = v => clamp(Math.floor(v/wide*g), 0, g-1), line = v => clamp(Math.floor(v/high*g), 0, g-1)
  const start = new Int32Array(g*g+1), inCell = new Int32Array(n)
  for (let i=0; i<n; i++) start[line(y[i])*g+col(x[i])+1]++
  for (let i=0; i<g*g; i++) start[i+1] += start[i]
  const at = start.slice()
  for (let i=0; i<n; i++) inCell[at[line(y[i])*g+col(x[i])]++] = i
  const each = (x0, y0, x1, y1, f) => { // rows in the cells that a rectangle of the map touches
    for (let v=line(y0); v<=line(y1); v++) for (let j=start[v*g+col(x0)]; j<start[v*g+col(x1)+1]; j++) f(inCell[j])
  }
  const around = (px, py, r, f) => each((px-r-view.tx)/view.k, (py-r-view.ty)/view.k, (px+r-view.tx)/view.k, (py+r-view.ty)/view.k, f)

  // ---- photos ----
  const sheetsOf = o => o && {...o, ims:o.urls.map(() => null)}
  const small = sheetsOf(data.sheets), large = sheetsOf(data.large)
  const load = (o, k) => {
    if (o.ims[k]) return
    const im = o.ims[k] = new Image()
    im.onload = () => { im.ready = true; ask(); for (const f of im.then_ || []) f() }
    im.src = o.urls[k]
  }
  const sheetOf = (o, i, then) => { // sheet, and where on it the photo of a row is; nothing while it is not there
    if (!o || !o.urls.length) return
    const per = o.cols*o.cols, k = Math.floor(data.slot[i]/per), j = data.slot[i]%per
    load(o, k)
    if (!o.ims[k].ready) { if (then) (o.ims[k].then_ ||= []).push(then); return }
    return [o.ims[k], j%o.cols*o.side, Math.floor(j/o.cols)*o.side, o.side]
  }
  const thumbs = new Map(), most = 400, queue = [] // photos that come one by one, those used last
  let loading = 0
  const next = () => {
    while (loading<6 && queue.length) {
      const im = queue.pop()
      if (im.src) continue
      loading++
      im.onload = () => { im.ready = true; loading--; ask(); next() }
      im.onerror = () => { loading--; next() }
      im.src = im.at
    }
  }
  const thumbOf = i => {
    let im = thumbs.get(i)
    if (im) { thumbs.delete(i); thumbs.set(i, im); return im.ready && im }
    im = new Image(); im.at = options.thumb(i); thumbs.set(i, im); queue.push(im)
    if (queue.length>150) thumbs.forEach((o, k) => { if (o===queue[0]) thumbs.delete(k) }), queue.shift()
    if (thumbs.size>most) thumbs.delete(thumbs.keys().next().value)
    next()
  }
  const drawPhoto = (i, px, py, s) => { // false where there is none yet
    const fine = s*dpr>(small ? small.side*1.25 : 0)
    const im = fine && options.thumb && !moving() && thumbOf(i)
    if (im) {
      const a = Math.min(im.naturalWidth, im.naturalHeight)
      ctx.drawImage(im, (im.naturalWidth-a)/2, (im.naturalHeight-a)/2, a, a, px-s/2, py-s/2, s, s)
      return true
    }
    const o = fine && sheetOf(large, i) || sheetOf(small, i)
    if (o) ctx.drawImage(o[0], o[1], o[2], o[3], o[3], px-s/2, py-s/2, s, s)
    return !!o
  }
  const photo = (i, side, cls='') => { // an element with the photo of a row
    if (options.thumb) return el('img', {src:options.thumb(i), alt:'', className:'dm-photo '+cls, loading:'lazy'})
    if (!small) return el('span', {className:'dm-photo dm-none '+cls})
    const o = el('canvas', {width:side, height:side, className:'dm-photo '+cls})
    const put = () => {
      const p = sheetOf(large, i, put) || sheetOf(small, i, put), d = o.getContext('2d')
      d.imageSmoothingQuality = 'high'
      if (p) d.drawImage(p[0], p[1], p[2], p[3], p[3], 0, 0, side, side)
    }
    put()
    return o
  }

  // ---- drawing ----
  const edge = 30 // so that no photo is cut
  const whole = (a=w, b=h) => Math.min(Math.max(a-2*edge, a/2)/wide, Math.max(b-2*edge, b/2)/high), zoom = () => view.k/whole() // at 1 the whole map is seen
  const photoSide = () => clamp((w<600 ? 34 : 42)*zoom()**.3, 28, 120)
  const ask = () => { if (!asked) asked = requestAnimationFrame(() => { asked = 0; draw() }) }
  let lastMove = 0
  const moving = () => performance.now()-lastMove<120
  const moved = () => { lastMove = performance.now(); clearTimeout(moved.t); moved.t = setTimeout(ask, 140); ask() }
  let pictured = new Set() // rows that are drawn as photos
  const draw = () => {
    const began = performance.now(), {k, tx, ty} = view, s = photoSide(), r = clamp(1.5*Math.sqrt(zoom()*3000/Math.max(n, 600))+.6, 1.4, 6)
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0)
    ctx.clearRect(0, 0, w, h)
    const dots = [...hue.map(() => []), []], photos = [], faint = hue.length
    const lit = i => within ? within.has(i) : shown ? shown.has(i) : selected<0 || i===selected || near.some(o => o[0]===i)
    const some = within || shown || selected>=0
    each((-s-tx)/k, (-s-ty)/k, (w+s-tx)/k, (h+s-ty)/k, i => {
      const px = x[i]*k+tx, py = y[i]*k+ty
      if (px<-s || py<-s || px>w+s || py>h+s) return
      if (view.photos && roomOf[i]*k>=s+5) photos.push(i)
      dots[some && !lit(i) ? faint : colour[c[i]]%hue.length].push(px, py)
    })
    const disc = (o, fill, r) => {
      ctx.fillStyle = fill
      ctx.beginPath()
      for (let j=0; j<o.length; j+=2) { ctx.moveTo(o[j]+r, o[j+1]); ctx.arc(o[j], o[j+1], r, 0, 6.2832) }
      ctx.fill()
    }
    ctx.globalAlpha = .28
    disc(dots[faint], style.soft, r)
    ctx.globalAlpha = view.photos ? .55 : .9
    for (let j=0; j<faint; j++) if (dots[j].length) disc(dots[j], hue[j], some ? r*1.35 : r)
    ctx.imageSmoothingQuality = 'medium'
    pictured = new Set()
    for (const i of photos) {
      const px = sx(i), py = sy(i)
      const faint = some && !lit(i)
      if (near.length && nearRoom.has(i)) continue // with its line
      ctx.globalAlpha = 1
      ctx.fillStyle = faint ? style.bg : paint(i)
      ctx.fillRect(px-s/2-2, py-s/2-2, s+4, s+4)
      if (faint) ctx.globalAlpha = .3
      if (drawPhoto(i, px, py, s)) pictured.add(i)
    }
    ctx.globalAlpha = 1
    if (view.names) names()
    if (selected>=0) links(s)
    if (hover>=0 && hover!==selected) ring(hover, s, style.ink, 2)
    if (path) {
      ctx.beginPath()
      path.forEach(([a, b], j) => j ? ctx.lineTo(a, b) : ctx.moveTo(a, b))
      ctx.closePath()
      ctx.globalAlpha = .14; ctx.fillStyle = style.accent; ctx.fill()
      ctx.globalAlpha = 1; ctx.strokeStyle = style.accent; ctx.lineWidth = 1.5; ctx.setLineDash([5, 4]); ctx.stroke(); ctx.setLineDash([])
    }
    return api.ms = performance.now()-began
  }
  const ring = (i, s, stroke, width) => {
    const px = sx(i), py = sy(i)
    ctx.lineWidth = width; ctx.strokeStyle = stroke
    if (pictured.has(i)) return ctx.strokeRect(px-s/2-2, py-s/2-2, s+4, s+4)
    ctx.beginPath(); ctx.arc(px, py, 7, 0, 6.2832); ctx.stroke()
  }
  const kind = o => c[o[0]]===c[selected] ? 'good' : 'bad'
  const links = s => { // lines to what the selected one is near to, and their photos where there is room
    const px = sx(selected), py = sy(selected), big = Math.max(s*1.15, 44)
    ctx.lineCap = 'round'
    for (const o of near) {
      ctx.strokeStyle = style[kind(o)]; ctx.lineWidth = 1.5; ctx.globalAlpha = .8
      ctx.beginPath(); ctx.moveTo(px, py); ctx.lineTo(sx(o[0]), sy(o[0])); ctx.stroke()
      ctx.globalAlpha = 1
      ring(o[0], s, style[kind(o)], 2.5)
    }
    for (const o of view.photos ? near : []) {
      const a = sx(o[0]), b = sy(o[0])
      if (nearRoom.get(o[0])*view.k<big+5) continue
      ctx.fillStyle = style[kind(o)]; ctx.fillRect(a-s/2-3, b-s/2-3, s+6, s+6)
      if (drawPhoto(o[0], a, b, s)) pictured.add(o[0])
    }
    pictured.add(selected)
    ctx.fillStyle = style.surface; ctx.fillRect(px-big/2-5, py-big/2-5, big+10, big+10)
    ctx.fillStyle = style.accent; ctx.fillRect(px-big/2-3, py-big/2-3, big+6, big+6)
    if (!(small || options.thumb) || !drawPhoto(selected, px, py, big)) { ctx.fillStyle = paint(selected); ctx.fillRect(px-big/2, py-big/2, big, big) }
  }

  // ---- names of classes, where their items lie together ----
  const middle = (() => {
    const rows = classes.map(() => []), mid = a => a.sort((p, q) => p-q)[a.length>>1]
    for (let i=0; i<n; i++) rows[c[i]].push(i)
    return rows.map((o, j) => {
      const mx = mid(o.map(i => x[i])), my = mid(o.map(i => y[i]))
      return {j, n:o.length, x:mx, y:my, far:mid(o.map(i => Math.hypot(x[i]-mx, y[i]-my)))}
    }).filter(o => o.n>1 && o.far<.12).sort((a, b) => b.n-a.n || a.far-b.far)
  })()
  const short = s => s.length>24 ? s.slice(0, 23)+'…' : s
  const names = () => {
    const taken = []
    ctx.font = '600 12px system-ui, sans-serif'; ctx.textAlign = 'center'; ctx.textBaseline = 'middle'; ctx.lineJoin = 'round'
    for (const o of middle) {
      if (taken.length>=60) break
      if (shown && !shown.classes.has(o.j)) continue
      const mid = o.x*view.k+view.tx, py = o.y*view.k+view.ty
      if (mid<0 || py<0 || mid>w || py>h) continue
      const text = short(classes[o.j].replaceAll('_', ' ')), half = ctx.measureText(text).width/2+5, px = clamp(mid, half, Math.max(half, w-half))
      if (taken.some(t => Math.abs(t[0]-px)<t[2]+half && Math.abs(t[1]-py)<19)) continue
      taken.push([px, py, half])
      ctx.lineWidth = 4; ctx.strokeStyle = style.bg; ctx.globalAlpha = .85; ctx.strokeText(text, px, py)
      ctx.globalAlpha = 1; ctx.fillStyle = style.ink; ctx.fillText(text, px, py)
    }
  }

  // ---- moving ----
  const bound = k => clamp(k, whole()*.5, whole()*clamp(n/4, 12, 400))
  const zoomAt = (px, py, f) => {
    const k = bound(view.k*f), q = k/view.k
    view.tx = px-(px-view.tx)*q; view.ty = py-(py-view.ty)*q; view.k = k
    keep(); moved()
  }
  const zoomBy = f => zoomAt(w/2, h/2, f)
  const keep = () => { // some of the map stays in sight
    view.tx = clamp(view.tx, w*.4-view.k*wide, w*.6); view.ty = clamp(view.ty, h*.4-view.k*high, h*.6); touched = true
  }
  let flight = 0
  const fly = (k, cx, cy) => { // until the point (cx, cy) of the map is in the middle
    cancelAnimationFrame(flight)
    k = bound(k)
    const from = {...view}, to = {tx:w/2-cx*k, ty:h/2-cy*k}, began = performance.now()
    const still = matchMedia('(prefers-reduced-motion: reduce)').matches
    const step = t => {
      const a = still ? 1 : clamp((t-began)/320, 0, 1), e = 1-(1-a)**3, kk = from.k*(k/from.k)**e
      const m = Math.abs(k/from.k-1)<1e-6 ? e : (kk-from.k)/(k-from.k)
      view.k = kk; view.tx = from.tx+(to.tx-from.tx)*m; view.ty = from.ty+(to.ty-from.ty)*m
      moved()
      if (a<1) flight = requestAnimationFrame(step)
    }
    flight = requestAnimationFrame(step)
  }
  const frame = (rows, least=.06) => { // show some rows
    let a = wide, b = high, cc = 0, d = 0
    for (const i of rows) { a = Math.min(a, x[i]); b = Math.min(b, y[i]); cc = Math.max(cc, x[i]); d = Math.max(d, y[i]) }
    fly(Math.min(w/Math.max(least, 1.3*(cc-a)), h/Math.max(least, 1.3*(d-b))), (a+cc)/2, (b+d)/2)
  }

  // ---- pointers: drag, pinch, lasso, click ----
  const hit = (px, py) => {
    const s = photoSide()
    let best = -1, d = 1
    around(px, py, Math.max(s/2, 12), i => {
      const a = Math.abs(sx(i)-px), b = Math.abs(sy(i)-py)
      const e = pictured.has(i) ? Math.max(a, b)/(s/2+2)*.9 : Math.hypot(a, b)/10
      if (e<d && !(shown && !shown.has(i))) { d = e; best = i }
    })
    return best
  }
  const fingers = new Map()
  let down = null
  const where = e => { const o = canvas.getBoundingClientRect(); return [e.clientX-o.left, e.clientY-o.top] }
  canvas.addEventListener('pointerdown', e => {
    if (e.button) return
    cancelAnimationFrame(flight)
    canvas.setPointerCapture(e.pointerId)
    const p = where(e)
    fingers.set(e.pointerId, p)
    hideTip()
    if (fingers.size===1) {
      down = {p, moved:false}
      if (e.shiftKey || view.lassoing) path = [p]
    } else { path = null; down.moved = true }
  })
  canvas.addEventListener('pointermove', e => {
    const p = where(e), old = fingers.get(e.pointerId)
    if (!old) { if (e.pointerType!=='touch') point(p); return }
    if (fingers.size===2) {
      const [other] = [...fingers].filter(o => o[0]!==e.pointerId)[0].slice(1)
      const before = Math.hypot(old[0]-other[0], old[1]-other[1]), now = Math.hypot(p[0]-other[0], p[1]-other[1])
      view.tx += (p[0]-old[0])/2; view.ty += (p[1]-old[1])/2
      zoomAt((p[0]+other[0])/2, (p[1]+other[1])/2, now/Math.max(before, 1))
    } else if (Math.hypot(p[0]-down.p[0], p[1]-down.p[1])>(e.pointerType==='touch' ? 8 : 3) || down.moved) {
      down.moved = true
      if (path) { path.push(p); ask() }
      else { view.tx += p[0]-old[0]; view.ty += p[1]-old[1]; keep(); moved(); canvas.classList.add('dm-dragging') }
    }
    fingers.set(e.pointerId, p)
  })
  const up = e => {
    if (!fingers.delete(e.pointerId)) return
    canvas.classList.remove('dm-dragging')
    if (fingers.size) return
    if (path && down.moved && path.length>2) lassoed(path)
    else if (!down.moved && e.type==='pointerup') {
      const i = hit(...where(e))
      i<0 ? api.clear() : api.select(i)
    }
    path = null
    ask()
  }
  canvas.addEventListener('pointerup', up)
  canvas.addEventListener('pointercancel', up)
  canvas.addEventListener('pointerleave', () => { hover = -1; hideTip(); ask() })
  canvas.addEventListener('wheel', e => {
    e.preventDefault()
    cancelAnimationFrame(flight)
    hideTip()
    zoomAt(...where(e), Math.exp(-clamp(e.deltaY*(e.deltaMode ? 30 : 1), -300, 300)*(e.ctrlKey ? .01 : .0022)))
  }, {passive:false})
  canvas.addEventListener('dblclick', e => { const [a, b] = where(e); fly(view.k*2.2, (a-view.tx)/view.k, (b-view.ty)/view.k) })
  const inside = (path, px, py) => {
    let res = false
    for (let i=0, j=path.length-1; i<path.length; j=i++) {
      const [a, b] = path[i], [e, d] = path[j]
      if (b>py!==d>py && px<(e-a)*(py-b)/(d-b)+a) res = !res
    }
    return res
  }
  const lassoed = path => {
    const xs = path.map(o => o[0]), ys = path.map(o => o[1]), res = []
    const a = Math.min(...xs), b = Math.min(...ys), e = Math.max(...xs), d = Math.max(...ys)
    each((a-view.tx)/view.k, (b-view.ty)/view.k, (e-view.tx)/view.k, (d-view.ty)/view.k, i => {
      if (!(shown && !shown.has(i)) && inside(path, sx(i), sy(i))) res.push(i)
    })
    if (view.lassoing) lassoButton.click()
    api.lasso(res)
  }

  // ---- what is under the pointer ----
  let tipped = -1
  const hideTip = () => { tip.hidden = true; tipped = -1 }
  const point = ([px, py]) => {
    const i = hit(px, py)
    canvas.classList.toggle('dm-over', i>=0)
    if (i!==hover) { hover = i; ask() }
    if (i<0) return hideTip()
    if (i!==tipped) { tip.replaceChildren(...card(i, 132)); tipped = i }
    tip.hidden = false
    const {offsetWidth:a, offsetHeight:b} = tip
    tip.style.transform = `translate(${Math.round(px+18+a>w ? px-a-14 : px+18)}px, ${Math.round(clamp(py-b/2, 6, Math.max(6, h-b-6)))}px)`
  }
  const dot = j => { const o = el('i', {className:'dm-dot'}); o.style.background = hue[colour[j]%hue.length]; return o }
  const name = j => classes[j].replaceAll('_', ' ')
  const card = (i, side) => [photo(i, side*2), el('div', {className:'dm-label'}, dot(c[i]), name(c[i])), el('div', {className:'dm-item'}, item[i] || '')]

  // ---- the panel ----
  const small_ = (i, score, cls='') => {
    const o = el('button', {type:'button', className:'dm-tile '+cls, title:[name(c[i]), item[i]].filter(Boolean).join('\n'), onclick:() => api.select(i)},
      photo(i, 160), el('b', {}, name(c[i])), ...(score===undefined ? [] : [ el('em', {title:'Cosine similarity: 1 is the same direction'+(score<options.threshold ? `; below ${options.threshold.toFixed(2)}, the calibrated threshold, it counts as another class` : '')}, score.toFixed(2))]))
    o.onmouseenter = () => { hover = i; ask() }
    o.onmouseleave = () => { hover = -1; ask() }
    return o
  }
  const close = () => el('button', {type:'button', className:'dm-close', title:'Close (Escape)', 'aria-label':'Close', onclick:() => { api.clear(); canvas.focus() }}, '×')
  const showPanel = (...kids) => {
    panel.hidden = false
    panel.replaceChildren(close(), ...kids)
    panel.scrollTop = 0
    resize()
  }
  const showNear = () => {
    const same = near.filter(o => c[o[0]]===c[selected]).length
    showPanel(el('div', {className:'dm-one'}, ...card(selected, 220)),
      ...options.open ? [el('button', {type:'button', className:'dm-open', onclick:() => options.open(selected)}, options.openText || 'Open')] : [],
      el('h3', {title:'The items with the greatest cosine similarity, nearest first'}, near.length ? `Nearest: ${same} of ${near.length} of the same class` : 'Nearest'),
      el('div', {className:'dm-tiles'}, ...near.map(o => small_(o[0], o[1], `dm-${kind(o)}${o[1]<options.threshold ? ' dm-below' : ''}`))))
  }
  const showWithin = rows => {
    const by = new Map()
    for (const i of rows) by.set(c[i], (by.get(c[i]) || 0)+1)
    const kinds = [...by].sort((a, b) => b[1]-a[1]), place = new Map(kinds.map((o, j) => [o[0], j]))
    rows = [...rows].sort((a, b) => place.get(c[a])-place.get(c[b]))
    showPanel(el('h2', {}, count(rows.length, 'item')), el('p', {className:'dm-soft'}, `of ${count(kinds.length, 'class', 'classes')}`),
      el('ul', {className:'dm-kinds'}, ...kinds.slice(0, 12).map(([j, k]) => el('li', {},
        el('button', {type:'button', title:'Show all items of this class', onclick:() => exactly(j)}, dot(j), el('span', {}, name(j)), el('em', {}, k.toLocaleString('en')))))),
      ...kinds.length>12 ? [el('p', {className:'dm-soft'}, `and ${count(kinds.length-12, 'other class', 'other classes')}`)] : [],
      el('div', {className:'dm-tiles'}, ...rows.slice(0, 60).map(i => small_(i))),
      ...rows.length>60 ? [el('p', {className:'dm-soft'}, `The first 60 of ${rows.length.toLocaleString('en')}.`)] : [])
  }

  // ---- search by the name of a class ----
  const rowsOf = keep => { const res = []; for (let i=0; i<n; i++) if (keep.has(c[i])) res.push(i); return res }
  /* The side of the square that each row has for a photo: of those with `s` or more no two squares of side `s` overlap, at any scale.
     It is the distance to those placed before; those that are far from them come first */
  const roomAmong = rows => {
    const res = new Float32Array(n), left = new Float32Array(n).fill(-1)
    for (const i of rows) left[i] = 9
    let rest = [...rows]
    for (let r=1, before=9; rest.length && r>1e-4; before=r, r*=.85) rest = rest.filter(i => {
      if (left[i]<r) return true
      res[i] = left[i]; left[i] = -1
      const a = x[i], b = y[i]
      each(a-before, b-before, a+before, b+before, q => {
        const u = Math.abs(x[q]-a), v = Math.abs(y[q]-b), d = u>v ? u : v
        if (left[q]>d) left[q] = d
      })
    })
    return res
  }
  const only = keep => { // these classes alone; all without any
    const rows = keep && rowsOf(keep)
    shown = rows && new Set(rows)
    if (shown) shown.classes = keep
    roomOf = rows ? roomAmong(rows) : room
    found.textContent = !rows ? '' : keep.size===1 ? count(rows.length, 'item') : `${rows.length.toLocaleString('en')} in ${count(keep.size, 'class', 'classes')}`
    said.textContent = found.textContent
    hover = -1; hideTip()
    ask()
    return rows || []
  }
  let chosen = -1
  const matches = text => { // classes with this in their names, those that begin with it first
    const t = fold(text.trim())
    return t ? classes.map((o, j) => [fold(o).indexOf(t), j]).filter(o => o[0]>=0).sort((a, b) => (a[0]>0)-(b[0]>0) || a[1]-b[1]).map(o => o[1]) : []
  }
  const mark = k => {
    const kids = [...list.children]
    chosen = (k+1+kids.length+1)%(kids.length+1)-1 // -1: none
    kids.forEach((o, j) => o.setAttribute('aria-selected', j===chosen))
    chosen<0 ? input.removeAttribute('aria-activedescendant') : input.setAttribute('aria-activedescendant', kids[chosen].id)
  }
  const closeList = () => { list.hidden = true; input.setAttribute('aria-expanded', false); chosen = -1 }
  const exactly = j => { input.value = name(j); closeList(); if (within) api.clear(); const rows = only(new Set([j])); frame(rows); return rows }
  const typed = () => {
    const js = matches(input.value)
    list.replaceChildren(...js.slice(0, 8).map((j, k) => el('li', {id:`dm-list-${k}`, role:'option', 'aria-selected':'false', onpointerdown:e => { e.preventDefault(); exactly(j) }}, dot(j), name(j))))
    list.hidden = !js.length
    input.setAttribute('aria-expanded', !list.hidden)
    chosen = -1
    if (!input.value.trim()) return only(null)
    const rows = only(new Set(js))
    if (!js.length) { found.textContent = said.textContent = 'No class has this in its name' }
    return rows
  }
  input.addEventListener('input', typed)
  input.addEventListener('blur', closeList)
  input.addEventListener('keydown', e => {
    const js = matches(input.value)
    if (e.key==='ArrowDown' || e.key==='ArrowUp') { e.preventDefault(); if (!list.hidden) mark(chosen+(e.key==='ArrowDown' ? 1 : -1)) }
    else if (e.key==='Enter') { e.preventDefault(); if (chosen>=0) exactly(js[chosen]); else if (js.length) { closeList(); frame(rowsOf(new Set(js))) } }
    else if (e.key==='Escape') { e.preventDefault(); if (!input.value) canvas.focus(); input.value = ''; closeList(); only(null) }
    e.stopPropagation()
  })

  // ---- keys ----
  const step = (dx, dy) => { // the nearest item in a direction
    const from = selected<0 ? [(w/2-view.tx)/view.k, (h/2-view.ty)/view.k] : [x[selected], y[selected]]
    let best = -1, d = Infinity
    for (let i=0; i<n; i++) {
      if (i===selected || shown && !shown.has(i)) continue
      const a = x[i]-from[0], b = y[i]-from[1], along = a*dx+b*dy, across = Math.abs(a*dy)+Math.abs(b*dx)
      const e = selected<0 ? Math.hypot(a, b) : along>0 && across<=1.2*along ? along+1.5*across : Infinity
      if (e<d) { d = e; best = i }
    }
    if (best>=0) api.select(best)
  }
  const ways = {ArrowLeft:[-1,0], ArrowRight:[1,0], ArrowUp:[0,-1], ArrowDown:[0,1]}
  root.addEventListener('keydown', e => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName==='INPUT') return
    const onMap = e.target===canvas, way = onMap && ways[e.key]
    if (way && e.shiftKey) { view.tx -= way[0]*80; view.ty -= way[1]*80; keep(); moved() }
    else if (way) step(...way)
    else if (e.key==='+' || e.key==='=') zoomBy(1.4)
    else if (e.key==='-') zoomBy(1/1.4)
    else if (e.key==='0') api.fit()
    else if (e.key==='/') input.focus()
    else if (e.key==='p' && data.sheets) photosButton.click()
    else if (e.key==='n') namesButton.click()
    else if (e.key==='l') lassoButton.click()
    else if (e.key==='Enter' && onMap && selected>=0 && options.open) options.open(selected)
    else if (e.key==='Escape') selected>=0 || within ? api.clear() : (input.value = '', only(null))
    else return
    e.preventDefault()
    e.stopPropagation()
  }, {signal:gone.signal})

  // ---- size ----
  const hidePanel = () => { if (!panel.hidden) { panel.hidden = true; resize() } }
  let extent = '' // size of all, with the panel
  const resize = () => {
    const a = stage.clientWidth, b = stage.clientHeight
    if (!a || !b) return
    const cx = (w/2-view.tx)/view.k, cy = (h/2-view.ty)/view.k, q = w ? whole(a, b)/whole() : 1
    dpr = Math.min(devicePixelRatio || 1, 2)
    if (canvas.width!==Math.round(a*dpr) || canvas.height!==Math.round(b*dpr)) { canvas.width = Math.round(a*dpr); canvas.height = Math.round(b*dpr) }
    const was = extent
    extent = `${root.clientWidth}×${root.clientHeight}`
    if (w && was===extent) { touched ||= a!==w || b!==h; w = a; h = b } // the panel has come or gone: what is seen stays where it is
    else if (!touched) { w = a; h = b; api.fit(false) }
    else { view.k *= q; w = a; h = b; view.tx = w/2-cx*view.k; view.ty = h/2-cy*view.k }
    cancelAnimationFrame(asked); asked = 0
    draw()
  }
  const watch = new ResizeObserver(resize)

  const api = {
    ms:0, view,
    get state() { return {selected, near, within:within && [...within], shown:shown && [...shown], photos:pictured.size, ms:api.ms} },
    draw,
    at:i => [sx(i), sy(i)], // where it is on the canvas
    boxes:() => [...pictured].map(i => [sx(i), sy(i)]), side:photoSide, // middles of the photos that are drawn, and how large they are
    async select(i) {
      if (within) api.clear()
      selected = i; near = []
      hideTip()
      if (shown && !shown.has(i)) { input.value = ''; only(null) }
      showNear()
      said.textContent = `${name(c[i])}, ${item[i] || ''}`
      if (sx(i)<40 || sy(i)<40 || sx(i)>w-40 || sy(i)>h-40) fly(view.k, x[i], y[i])
      ask()
      if (options.select) options.select(i)
      const got = await (options.near ? options.near(i) : (data.near || [])[i]) || []
      if (selected!==i) return
      near = got
      const rows = [i, ...near.map(o => o[0])], r = roomAmong(rows)
      nearRoom = new Map(rows.map(o => [o, r[o]]))
      showNear()
      ask()
    },
    lasso(rows) {
      if (!rows.length) return api.clear()
      selected = -1; near = []; within = new Set(rows); roomOf = roomAmong(rows)
      showWithin(rows)
      said.textContent = count(rows.length, 'item')
      if (options.lasso) options.lasso(rows)
      ask()
    },
    find(text) { input.value = text; const rows = typed(); closeList(); return rows },
    show:frame,
    clear() {
      if (within) roomOf = shown ? roomAmong([...shown]) : room
      selected = -1; near = []; within = null
      hidePanel(); ask()
    },
    fit(flying=true) {
      const k = whole()
      touched = false
      if (flying) fly(k, wide/2, high/2)
      else { view.k = k; view.tx = (w-k*wide)/2; view.ty = (h-k*high)/2; ask() }
    },
    destroy() { watch.disconnect(); gone.abort(); root.replaceChildren() }
  }
  scheme.addEventListener('change', colours, {signal:gone.signal})
  colours()
  watch.observe(stage)
  resize()
  if (view.photos) setTimeout(() => { // the dots are there, and now who is a photo
    room = roomAmong([...Array(n).keys()].sort((a, b) => a*7919%n-b*7919%n)) // not class by class
    if (!shown && !within) roomOf = room
    ask()
  })
  return root.dmlMap = api
}
