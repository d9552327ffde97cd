"A page in headless Chromium, by the DevTools protocol over a pipe: needs no other package"
import json, os, select, shutil, subprocess, time
from base64 import b64decode
from fcntl import F_DUPFD, fcntl

chromium = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)

class Browser:
    "One page: goes where it is told, evaluates JavaScript, and keeps what the console and the network complain of"
    def __init__(self, profile, width=1280, height=900, dark=False, args=()):
        (reads,self._in),(self._out,writes) = os.pipe(),os.pipe()
        reads,writes = [(fcntl(o, F_DUPFD, 10), os.close(o))[0] for o in (reads,writes)] # away from 3 and 4, where Chromium wants them
        def wire():
            os.dup2(reads, 3)
            os.dup2(writes, 4)
        self._proc = subprocess.Popen([chromium,'--headless','--no-sandbox','--disable-gpu','--hide-scrollbars','--remote-debugging-pipe',
            f'--user-data-dir={profile}',*args],
            preexec_fn=wire, pass_fds=(3,4), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self._n,self._session,self._buf,self.faults,self.urls,self._loaded = 0,{},b'',[],[],False
        page = self.call('Target.createTarget', url='about:blank')['targetId']
        self._session = dict(sessionId=self.call('Target.attachToTarget', targetId=page, flatten=True)['sessionId'])
        for o in ('Page','Runtime','Network','Log'): self.call(f'{o}.enable')
        self.look(width, height, dark)

    def __enter__(self): return self
    def __exit__(self, *args):
        os.close(self._in)
        os.close(self._out)
        self._proc.terminate()
        self._proc.wait(20)

    def _message(self, timeout):
        "The next message, or nothing when there is none for so many seconds"
        while b'\0' not in self._buf:
            if not select.select([self._out], [], [], timeout)[0]: return
            if not (more := os.read(self._out, 1<<20)): raise RuntimeError('Chromium ended')
            self._buf += more
        msg,self._buf = self._buf.split(b'\0', 1)
        return json.loads(msg)

    def _note(self, method, p):
        "Keep what an event says"
        if method=='Page.loadEventFired': self._loaded = True
        if method=='Network.requestWillBeSent': self.urls.append(p['request']['url'])
        if method=='Network.loadingFailed' and not p.get('canceled'): self.faults.append(f"failed: {p['errorText']}")
        if method=='Network.responseReceived' and p['response']['status']>=400:
            self.faults.append(f"{p['response']['status']}: {p['response']['url']}")
        if method=='Runtime.exceptionThrown':
            self.faults.append(f"exception: {p['exceptionDetails']['text']} "
                f"{p['exceptionDetails'].get('exception', {}).get('description', '')}")
        if method=='Runtime.consoleAPICalled' and p['type'] in ('error','warning','assert'):
            self.faults.append(f"console: {[o.get('value') for o in p['args']]}")
        if method=='Log.entryAdded' and p['entry']['level'] in ('error','warning'): self.faults.append(f"log: {p['entry']['text']}")

    def call(self, method, timeout=60, **params):
        "Result of a command of the protocol"
        self._n += 1
        os.write(self._in, json.dumps(dict(id=self._n, method=method, params=params, **self._session)).encode()+b'\0')
        while msg := self._message(timeout):
            if msg.get('id')==self._n:
                if 'error' in msg: raise RuntimeError(f"{method}: {msg['error']['message']}")
                return msg['result']
            if 'method' in msg: self._note(msg['method'], msg['params'])
        raise TimeoutError(f'{method} was not answered in {timeout} s')

    def look(self, width, height=900, dark=False):
        "Set the size of the window and the colours the reader prefers"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<600)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])

    def go(self, url):
        "Open `url`, and wait until it is loaded"
        self._loaded = False
        if err := self.call('Page.navigate', url=url).get('errorText'): raise RuntimeError(f'{url}: {err}')
        self.wait()

    def wait(self, js='true', seconds=60):
        "Wait until a page is loaded and `js` holds on it; its value"
        end = time.monotonic()+seconds
        while time.monotonic()<end:
            if self._loaded and (res := self.eval(js)): return res
            if msg := self._message(.05): self._note(msg.get('method'), msg.get('params'))
        raise TimeoutError(f'not within {seconds} s: {js}')

    def eval(self, js):
        "Value of a JavaScript expression"
        res = self.call('Runtime.evaluate', expression=js, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in res: raise RuntimeError(f"{js}: {res['exceptionDetails'].get('exception', {}).get('description')}")
        return res['result'].get('value')

    def click(self, js):
        "Click the element that `js` gives, and wait for the page it leads to"
        self._loaded = False
        self.eval(f'({js}).click()')
        self.wait()

    def picture(self, file, full=True):
        "Write a PNG of the page"
        data = self.call('Page.captureScreenshot', captureBeyondViewport=full, **(dict(clip=self._clip()) if full else {}))['data']
        with open(file, 'wb') as f: f.write(b64decode(data))

    def _clip(self):
        s = self.call('Page.getLayoutMetrics')['cssContentSize']
        return dict(x=0, y=0, width=s['width'], height=s['height'], scale=1)
